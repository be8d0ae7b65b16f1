"""The command line of trainings of combiners and gates: Lightning's `fit`, with a folder for each run."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_knnmt.checks import refuse_existing
from lightning_knnmt.knn.trained import DESCRIPTION
from lightning_knnmt.training.command_line import TrainingParser
from lightning_knnmt.training.parts import CombinerModule, GateModule, PartModule
from lightning_knnmt.training.steps_datamodule import StepsDataModule

PARTS = {"gate": GateModule, "combiner": CombinerModule}  # the first one that is named is trained


def part_in(args: Sequence[str]) -> str | None:
    """Which part a command line trains: what its options, or the files that they name, have under `model`.

    >>> part_in(["fit", "--model.combiner=AdaptiveCombiner"])
    'combiner'
    """
    named = {name for name in PARTS for arg in args if arg.startswith(f"--model.{name}")}
    for number, arg in enumerate(args):
        option, given, value = arg.partition("=")
        if option in ("--config", "-c"):
            path = Path(value if given else "".join(args[number + 1 : number + 2]))
            content = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else None
            model = content.get("model") if isinstance(content, dict) else None
            named |= PARTS.keys() & (model.keys() if isinstance(model, dict) else ())
    return next((name for name in PARTS if name in named), None)


class ExportPart(L.Callback):
    """Write the part after each validation that is the best so far.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.best = folder, float("inf")

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the part if it is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit" or not isinstance(pl_module, PartModule):
            return
        value = float(trainer.callback_metrics["val/loss"])
        if value < self.best and trainer.is_global_zero:
            self.best = value
            pl_module.save(self.folder)


class PartCLI(LightningCLI):
    """`fit` of a combiner or a gate; the best one is in the run's folder, --trainer.default_root_dir.

    Args:
        part: `combiner` or `gate`, which is also the folder's name there.
        args: The command line; None: that of the process.
    """

    def __init__(self, part: str, args: Sequence[str] | None = None) -> None:
        self.part_name = part
        super().__init__(
            PARTS[part],
            StepsDataModule,
            args=None if args is None else list(args),
            seed_everything_default=1,
            save_config_kwargs={"overwrite": True},
            trainer_defaults={"enable_checkpointing": False, "num_sanity_val_steps": 0, "log_every_n_steps": 10},
            parser_class=TrainingParser,
            auto_configure_optimizers=False,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be done, with the arguments that are no options."""
        return {"fit": LightningCLI.subcommands()["fit"]}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Have the part written to the run's folder."""
        parser.add_argument("--overwrite", type=bool, default=False, help="Take the place of the run in this folder.")
        parser.add_lightning_class_args(ExportPart, "export")
        parser.link_arguments("trainer.default_root_dir", "export.folder", compute_fn=self._folder)

    def _folder(self, root: str | None) -> Path:
        return Path("." if root is None else root) / self.part_name

    def before_instantiate_classes(self) -> None:
        """Refuse a folder that holds another run."""
        options = self.config[self.subcommand]
        folder = self._folder(options.trainer.default_root_dir)
        refuse_existing(options.overwrite, **{"trainer.default_root_dir": folder / DESCRIPTION})

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """A trainer that logs to a table in the run's folder, unless a logger is given."""
        options = self.config_init[self.subcommand].trainer
        if options.logger in (None, True):
            kwargs["logger"] = CSVLogger(options.default_root_dir or ".")
        return super().instantiate_trainer(**kwargs)
