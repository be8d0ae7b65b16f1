"""Pictures of training, for every kind of logger."""

from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from torch import Tensor

from lightning_knnmt.index.balance import imbalance_factor

_BARS = 24  # at most


def list_size_histogram(sizes: Tensor, step: int) -> Figure:
    """Draw how many lists have how many entries; empty lists are counted in the legend.

    Args:
        sizes: Entries of each list, shape (nlist,).
        step: The training step that the picture shows.
    """
    counts = sizes.numpy()
    filled = counts[counts > 0]
    low, high = (int(filled.min()), int(filled.max())) if len(filled) else (1, 1)
    edges = np.unique(np.geomspace(low, high + 1, _BARS + 1).round()) - 0.5  # between whole numbers
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    label = f"{len(counts):,} lists, {len(counts) - len(filled):,} of them empty"
    axes.hist(filled, bins=edges.tolist(), color="tab:blue", edgecolor="white", linewidth=0.5, label=label)
    mean = counts.mean()
    axes.axvline(mean, color="black", linestyle=":", label=f"even lists: {mean:,.0f} entries each")
    axes.set(
        xlabel="entries in a list",
        ylabel="lists",
        xscale="log",
        title=f"Step {step:,}: imbalance factor {imbalance_factor(sizes):.2f}",
        xlim=(max(0.51, min(edges[0], mean) / 1.1), max(edges[-1], mean) * 1.1),
        ylim=(
            0,
            1.3 * max(bar.get_height() for bar in axes.patches if isinstance(bar, Rectangle)),
        ),  # room for the legend
    )
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    return figure


def log_figure(trainer: L.Trainer, name: str, figure: Figure) -> None:
    """Give a figure to the loggers of a trainer: W&B, TensorBoard, and as a PNG file beside the CSV logger's table."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3]  # (height, width, RGB)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(name, [pixels], step=trainer.global_step)
        elif isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, pixels, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, CSVLogger):
            path = Path(logger.log_dir) / f"{name.replace('/', '_')}_{trainer.global_step:07d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, dpi=150)
