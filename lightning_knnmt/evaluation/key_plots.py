"""Pictures of what keys of any index do: lists by metric, and where their directions lie."""

from collections.abc import Mapping

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.dispersion.functional.directions import directions
from lightning_knnmt.evaluation.plots import StoreSample, draw_sorted, legend_below
from lightning_knnmt.index.config import choose_nlist
from lightning_knnmt.index.splitting import metric_centroids
from lightning_knnmt.metric import Metric, distances

WAYS: dict[str, tuple[Metric, bool]] = {  # [label -> metric, whether centroids have unit norm]
    "squared distances": ("l2", False),
    "inner products, unit centroids": ("ip", True),
    "inner products, any centroids": ("ip", False),
}


def metric_figure(stores: Mapping[str, StoreSample], seed: int = 1) -> Figure:
    """Draw the sizes of the lists that k-means makes of the same keys by squared distances and by inner products.

    Args:
        stores: By label; the sampled keys are put into the power of two of lists nearest to the square root of their
            number.
        seed: Of k-means.
    """
    sizes = {label: sizes_by_metric(store.keys, seed) for label, store in stores.items()}
    largest = max(int(counts.max()) for ways in sizes.values() for counts in ways.values())
    figure = Figure(figsize=(7 * len(stores), 5), layout="constrained")
    panels = figure.subplots(1, len(stores), squeeze=False)[0]
    for axes, (label, store) in zip(panels, stores.items(), strict=True):
        draw_sorted(axes, sizes[label])
        axes.set(
            title=f"{label}: {len(store.keys):,} keys, {choose_nlist(len(store.keys)):,} lists (dotted: even)",
            yscale="log",
            ylim=(0.8, 1.5 * largest),
        )
        axes.yaxis.set_major_formatter("{x:,.0f}")  # a new scale brings its own
        legend_below(axes)
    return figure


def sizes_by_metric(keys: NDArray[np.float32], seed: int = 1) -> dict[str, NDArray[np.int64]]:
    """Sizes of the lists of some keys, by the way in which lists are made.

    Args:
        keys: Shape (N, D).
        seed: Of k-means.

    Returns:
        By label, shape (nlist,) each.
    """
    nlist = choose_nlist(len(keys))
    found = {}
    for label, (metric, unit) in WAYS.items():
        centroids = torch.from_numpy(metric_centroids(keys, nlist, metric, unit, seed))
        nearest = [distances(part, centroids, metric).argmin(dim=1) for part in torch.from_numpy(keys).split(4096)]
        found[label] = torch.bincount(torch.cat(nearest), minlength=nlist).numpy()
    return found


def direction_figure(stores: Mapping[str, StoreSample]) -> Figure:
    """Draw where the keys' directions lie: along their mean, and along the axis on which they vary most besides.

    Directions that fill the sphere lie around the middle; a common direction moves them to the right.

    Args:
        stores: By label.
    """
    figure = Figure(figsize=(5.5 * len(stores), 6.5), layout="constrained")
    panels = figure.subplots(1, len(stores), squeeze=False)[0]
    circle = np.linspace(0, 2 * np.pi, 361)
    for axes, (label, store) in zip(panels, stores.items(), strict=True):
        unit = directions(torch.from_numpy(store.keys))
        along = in_the_plane(unit).numpy()
        density = axes.hexbin(
            along[:, 0], along[:, 1], gridsize=70, extent=(-1, 1, -1, 1), bins="log", mincnt=1, cmap="viridis"
        )
        figure.colorbar(density, ax=axes, label="keys in a cell", shrink=0.7)
        axes.plot(np.cos(circle), np.sin(circle), color="black", linewidth=1, label="length 1")
        axes.plot([0], [0], "+", color="black", label="middle of the sphere")
        axes.plot(along[:, 0].mean(), along[:, 1].mean(), "o", color="red", markersize=6, label="mean of the keys")
        axes.set(
            title=f"{label}: mean resultant length {float(unit.mean(dim=0).norm()):.2f}",
            xlabel="along the mean direction",
            ylabel="along the axis of most variance besides",
            xlim=(-1.05, 1.05),
            ylim=(-1.05, 1.05),
            aspect="equal",
        )
        legend_below(axes)
    return figure


def in_the_plane(unit: Tensor) -> Tensor:
    """Coordinates of directions along their mean, and along the first principal axis of what is left.

    Args:
        unit: Directions, shape (N, D).

    Returns:
        Shape (N, 2).
    """
    mean = torch.nn.functional.normalize(unit.mean(dim=0), dim=0)
    along = unit @ mean
    rest = unit - along[:, None] * mean
    centered = rest - rest.mean(dim=0)
    axis = torch.linalg.eigh(centered.T @ centered)[1][:, -1]
    return torch.stack([along, rest @ axis], dim=1)
