"""Train a model, or what mixes neighbors in: ``python train.py fit --config configs/dispersion/pretix.yaml``.

A configuration that names a model.combiner or a model.gate, such as ``configs/combiners/adaptive.yaml``, trains that
part for a model and its datastore. What all trainings of models share is in ``configs/training.yaml``.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from lightning_knnmt.training.command_line import TrainingCLI, errors_in_one_line

SHARED = Path(__file__).parent / "configs" / "training.yaml"


def main(args: Sequence[str] | None = None) -> None:
    """Run Lightning's command line: fit or validate."""
    from lightning_knnmt.training.parts_command_line import PartCLI, part_in

    with errors_in_one_line():
        part = part_in(sys.argv[1:] if args is None else args)
        if part is None:
            TrainingCLI(SHARED, args)
        else:
            PartCLI(part, args)


if __name__ == "__main__":
    main()
