"""Make a new, untrained model with a tokenizer of its own: ``python init_model.py --config configs/base_init.yaml``."""

from pathlib import Path

from lightning_knnmt.backbone.scratch import ModelShape, init_model
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.splits import read_split


def init(train: Path, out: Path, shape: ModelShape = ModelShape(), seed: int = 1) -> None:
    """Train joint subwords on a corpus and write them with a randomly initialised model.

    Args:
        train: Training split, a file written by `prepare_data.py`.
        out: Folder of the new model.
        shape: Family and sizes of the model.
        seed: Seed of the weights.
    """
    pairs = read_split(train)
    if not pairs:
        raise ValueError(f"train is {train}, which is empty; expected one pair or more")
    init_model((text for pair in pairs for text in (pair.src, pair.tgt)), out, shape, seed)


if __name__ == "__main__":
    run_script(init)
