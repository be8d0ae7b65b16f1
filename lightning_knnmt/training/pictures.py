"""Pictures of training, for every kind of logger."""

from pathlib import Path

import lightning as L
import numpy as np
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lightning_knnmt.index.balance import imbalance_factor


def list_size_histogram(sizes: Tensor, step: int) -> Figure:
    """Draw how many lists have how many entries.

    Args:
        sizes: Entries of each list, shape (nlist,).
        step: The training step that the picture shows.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    counts = sizes.numpy()
    axes.hist(counts, bins=40, range=(0, counts.max() + 1), log=True, color="tab:blue")
    axes.axvline(counts.mean(), color="black", linestyle=":", label=f"even lists: {counts.mean():.0f} entries")
    axes.set(
        xlabel="entries in a list",
        ylabel="lists (logarithmic)",
        title=f"Step {step}: {len(counts)} lists, imbalance factor {imbalance_factor(sizes):.2f}",
        xlim=(0, None),
    )
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
