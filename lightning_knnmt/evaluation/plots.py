"""Pictures of an index and of the keys in it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_knnmt.datastore import Datastore
from lightning_knnmt.dispersion.functional.directions import angle, directions
from lightning_knnmt.index.balance import imbalance_factor
from lightning_knnmt.index.opening import load_index


@dataclass(frozen=True)
class StoreSample:
    """What is drawn of a built datastore.

    Attributes:
        sizes: Entries of each inverted list, shape (nlist,).
        keys: A uniform sample of the keys, shape (N, D).
        probed: The lists that these keys, as queries, scan with growing nprobe, shape (N, nprobe), nearest list first.
    """

    sizes: NDArray[np.int64]
    keys: NDArray[np.float32]
    probed: NDArray[np.int64]

    @property
    def imbalance_factor(self) -> float:
        """Of the index; 1 is perfect."""
        return imbalance_factor(torch.from_numpy(self.sizes))


def sample_store(
    folder: Path | str, name: str = "index", size: int = 20_000, nprobe: int = 128, seed: int = 1
) -> StoreSample:
    """Read what the pictures need from a datastore and its index.

    Args:
        folder: The datastore.
        name: Its index, one with inverted lists.
        size: Keys in the sample, at most.
        nprobe: Largest number of lists that a query scans.
        seed: Seed of the sample.

    Raises:
        DatastoreError: The datastore or the index is missing or damaged.
        ValueError: The index has no inverted lists.
    """
    with Datastore(folder) as store:
        index = load_index(store, name)
        sizes = index.list_sizes()
        if sizes is None:
            raise ValueError(
                f"the index {name!r} of {folder} has no inverted lists, expected one such as IVF1024,PQ64x4fs; "
                "build it with build_index.py under another name"
            )
        keys = store.sample_keys(size, seed)
    return StoreSample(sizes, keys, index.probed_lists(keys, nprobe))


def plot_list_sizes(sizes: Mapping[str, NDArray[np.int64]], path: Path | str) -> None:
    """Draw the sorted sizes of inverted lists, one curve for each index, and write the picture.

    Args:
        sizes: Entries of each list, shape (nlist,), by the index's label.
        path: Where the picture goes; its suffix decides the format.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    draw_sorted(axes, sizes)
    axes.set_title("Cluster sizes (dotted: a perfectly even index)")
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def list_size_figure(stores: Mapping[str, StoreSample]) -> Figure:
    """Draw sorted list sizes, their histogram and their Lorenz curve.

    Args:
        stores: By label.
    """
    sizes = {label: store.sizes for label, store in stores.items()}
    figure = Figure(figsize=(14, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    draw_sorted(left, sizes)
    left.set(title="Sorted sizes (dotted: even lists)", yscale="log", ylim=(0.8, None))
    left.yaxis.set_major_formatter("{x:,.0f}")  # a new scale brings its own
    _draw_histogram(middle, sizes)
    _draw_lorenz(right, sizes)
    for axes in (left, middle, right):
        legend_below(axes)
    return figure


def angle_figure(stores: Mapping[str, StoreSample], seed: int = 1) -> Figure:
    """Draw the distributions of angles between random pairs of keys, and from the keys to their mean direction.

    Args:
        stores: By label.
        seed: Seed of the pairs.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    edges = np.linspace(0, 180, 91)
    for label, store in stores.items():
        unit = directions(torch.from_numpy(store.keys))
        mean = unit.mean(dim=0)
        shuffled = unit[torch.randperm(len(unit), generator=torch.Generator().manual_seed(seed))]
        between = torch.rad2deg(angle(shuffled, shuffled.roll(1, dims=0))).numpy()
        to_mean = torch.rad2deg(angle(unit, (mean / mean.norm()).expand_as(unit))).numpy()
        _draw_shares(left, between, edges, f"{label}: median {np.median(between):.0f}°")
        _draw_shares(right, to_mean, edges, f"{label}: mean resultant length {float(mean.norm()):.2f}")
    for key_size in sorted({store.keys.shape[1] for store in stores.values()}):
        left.plot(*_uniform_angles(key_size), color="black", linestyle=":", label=f"uniform, D = {key_size}")
    left.set(title="Between random pairs of keys", xlabel="angle (degrees)", ylabel="pairs per degree (%)")
    right.set(title="To the keys' mean direction", xlabel="angle (degrees)", ylabel="keys per degree (%)")
    for axes in (left, right):
        axes.set(xlim=(0, 180), ylim=(0, None), xticks=range(0, 181, 30))
        legend_below(axes)
    return figure


def search_cost_figure(stores: Mapping[str, StoreSample]) -> Figure:
    """Draw how many codes a query that follows the data scans, against nprobe.

    Lines are min(N, nprobe · N · imbalance / nlist); markers the mean over the sampled keys as queries.

    Args:
        stores: By label.
    """
    figure = Figure(figsize=(11, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    for number, (label, store) in enumerate(stores.items()):
        color = f"C{number}"
        entries, nlist = store.sizes.sum(), len(store.sizes)
        largest = store.probed.shape[1]
        nprobe = 2 ** np.arange(np.log2(largest) + 1).astype(int)
        even = nprobe * entries / nlist
        expected = np.minimum(entries, even * store.imbalance_factor)
        name = f"{label} (N = {entries:,}, {nlist:,} lists)"
        left.plot(nprobe, expected, color=color, label=f"{name}: by imbalance factor")
        right.plot(
            nprobe, expected / even, color=color, label=f"{label}: imbalance factor {store.imbalance_factor:.2f}"
        )
        scanned = codes_scanned(store.sizes, store.probed)[nprobe - 1]
        left.plot(nprobe, scanned, "o", color=color, label=f"{name}: measured")
        right.plot(nprobe, scanned / even, "o", color=color, label=f"{label}: measured")
    right.axhline(1, color="black", linestyle=":", label="even lists")
    left.set(title="Codes scanned", ylabel="codes scanned per query", yscale="log")
    right.set(title="Relative to even lists", ylabel="codes scanned / (nprobe · N / nlist)", ylim=(0, None))
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("nprobe (lists per query)")
        axes.xaxis.set_major_formatter("{x:.0f}")
        legend_below(axes)
    left.yaxis.set_major_formatter("{x:,.0f}")
    return figure


def codes_scanned(sizes: NDArray[np.int64], probed: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean number of codes that a query scans with nprobe = 1, 2, ….

    Args:
        sizes: Entries of each list, shape (nlist,).
        probed: Lists of each query, nearest first, shape (R, nprobe); −1 for none.

    Returns:
        Shape (nprobe,).

    >>> codes_scanned(np.array([3, 1, 0]), np.array([[0, 1, 2], [2, 1, 0]])).tolist()
    [1.5, 2.5, 4.0]
    """
    return np.where(probed >= 0, sizes[probed], 0).mean(axis=0).cumsum()


def legend_below(axes: Axes) -> None:
    """Put the legend under a picture, where it hides nothing."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16), frameon=False)


def draw_sorted(axes: Axes, sizes: Mapping[str, NDArray[np.int64]]) -> None:
    """Draw the sizes of inverted lists, largest first, a curve with its imbalance factor for each label."""
    for label, counts in sizes.items():
        factor = imbalance_factor(torch.from_numpy(counts))
        share = np.arange(1, len(counts) + 1) / len(counts) * 100
        (line,) = axes.plot(share, np.sort(counts)[::-1], label=f"{label}: imbalance factor {factor:.2f}")
        axes.axhline(counts.mean(), color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(xlabel="inverted lists, largest first (%)", ylabel="entries in a list", xlim=(0, 100), ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend()


def _draw_histogram(axes: Axes, sizes: Mapping[str, NDArray[np.int64]]) -> None:
    largest = max(1, *(int(counts.max()) for counts in sizes.values()))
    edges = np.unique(np.geomspace(1, largest + 1, 31).round())  # sizes are whole: no bin falls between two
    for label, counts in sizes.items():
        name = f"{label}: {len(counts):,} lists, {np.mean(counts == 0):.0%} empty"
        lists = np.histogram(counts, edges)[0]
        patch = axes.stairs(100 * lists / len(counts), edges, linewidth=1.5, label=name)
        axes.axvline(counts.mean(), color=patch.get_edgecolor(), linestyle=":", linewidth=1)
    axes.set(title="Histogram (dotted: even lists)", xlabel="entries in a list", ylabel="lists (%)", xscale="log")
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _draw_lorenz(axes: Axes, sizes: Mapping[str, NDArray[np.int64]]) -> None:
    for label, counts in sizes.items():
        entries = np.concatenate([[0], np.sort(counts).cumsum()]) / max(counts.sum(), 1) * 100
        factor = imbalance_factor(torch.from_numpy(counts))
        axes.plot(np.linspace(0, 100, len(entries)), entries, label=f"{label}: imbalance factor {factor:.2f}")
    axes.plot([0, 100], [0, 100], color="black", linestyle=":", label="even lists: 1")
    axes.set(
        title="Lorenz curve",
        xlabel="inverted lists, smallest first (%)",
        ylabel="entries in them (%)",
        xlim=(0, 100),
        ylim=(0, 100),
        aspect="equal",
    )


def _draw_shares(axes: Axes, values: NDArray[np.float32], edges: NDArray[np.float64], label: str) -> None:
    density = np.histogram(values, edges, density=True)[0]
    axes.stairs(100 * density, edges, linewidth=1.5, label=label)


def _uniform_angles(key_size: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Degrees, and percent per degree of the angle between uniform directions: proportional to sin(angle)^(D − 2)."""
    degrees = np.linspace(0, 180, 721)[1:-1]
    density = np.sin(np.deg2rad(degrees)) ** (key_size - 2)
    return degrees, 100 * density / (density.sum() * (degrees[1] - degrees[0]))
