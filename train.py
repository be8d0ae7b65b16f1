"""Train or fine-tune a translation model: ``python train.py fit --config configs/dispersion/pretix.yaml``.

What all runs share is in ``configs/training.yaml``.
"""

from collections.abc import Sequence
from pathlib import Path

from lightning_knnmt.training.command_line import TrainingCLI, errors_in_one_line

SHARED = Path(__file__).parent / "configs" / "training.yaml"


def main(args: Sequence[str] | None = None) -> None:
    """Run Lightning's command line: fit or validate."""
    with errors_in_one_line():
        TrainingCLI(SHARED, args)


if __name__ == "__main__":
    main()
