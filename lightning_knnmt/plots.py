"""Pictures of an index."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray

from lightning_knnmt.functional.clusters import imbalance_factor


def plot_list_sizes(sizes: Mapping[str, NDArray[np.int64]], path: Path) -> None:
    """Draw the sorted sizes of inverted lists, one curve for each index, and write the picture.

    Args:
        sizes: Entries of each list, shape (nlist,), by the index's label.
        path: Where the picture goes; its suffix decides the format.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, counts in sizes.items():
        factor = imbalance_factor(torch.from_numpy(counts))
        share = np.arange(1, len(counts) + 1) / len(counts) * 100
        (line,) = axes.plot(share, np.sort(counts)[::-1], label=f"{label}: imbalance factor {factor:.2f}")
        axes.axhline(counts.mean(), color=line.get_color(), linestyle=":", linewidth=1)
    axes.set(
        xlabel="inverted lists, largest first (%)",
        ylabel="entries in a list",
        title="Cluster sizes (dotted: a perfectly even index)",
        xlim=(0, 100),
        ylim=(0, None),
    )
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
