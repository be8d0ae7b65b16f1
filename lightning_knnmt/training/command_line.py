"""The command line of training: Lightning's, with a folder for each run and errors in one line."""

import inspect
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger

from lightning_knnmt import dispersion
from lightning_knnmt.checks import check_at_least, check_number
from lightning_knnmt.cli import EXPECTED, USER_ERROR, reason_of
from lightning_knnmt.training.callbacks import ExportBackbone
from lightning_knnmt.training.datamodule import TranslationDataModule
from lightning_knnmt.training.module import TranslationModule

# Options that Lightning stops at in the middle, or takes without sense, with the least that makes some.
LEAST = {"accumulate_grad_batches": 1, "log_every_n_steps": 0, "num_sanity_val_steps": -1}


class TrainingParser(LightningArgumentParser):
    """A parser that says in one line what it does not take."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with status 2; an unknown dispersion loss is answered with those that there are."""
        losses = f" The dispersion losses are {', '.join(dispersion_losses())}" if "model.dispersion" in message else ""
        message = re.sub(r"argument \S+\((\S+)\) --> (\S+): .*", r"\2 follows from \1; give \1 instead", message)
        message = " ".join(reason_of(message).split()) + losses
        if not self.exit_on_error or os.environ.get("JSONARGPARSE_DEBUG"):
            super().error(message, ex)
        sys.stderr.write(f"error: {message}\n")
        sys.exit(USER_ERROR)


class TrainingCLI(LightningCLI):
    """`fit` and `validate`.

    A run has a folder, `--trainer.default_root_dir`: its table of logged values, checkpoints and model are there. A
    folder that holds another run's is refused, unless that run is resumed or `--overwrite true` is given.

    Args:
        shared: Configuration file with the defaults of all runs.
        args: The command line; None: that of the process.
    """

    def __init__(self, shared: Path, args: Sequence[str] | None = None) -> None:
        defaults = {"default_config_files": [str(shared)]}
        super().__init__(
            TranslationModule,
            TranslationDataModule,
            args=None if args is None else list(args),
            save_config_kwargs={"overwrite": True},
            parser_class=TrainingParser,
            auto_configure_optimizers=False,
            parser_kwargs={name: dict(defaults) for name in self.subcommands()},
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """What can be done, with the arguments that are no options."""
        every = LightningCLI.subcommands()
        return {name: every[name] for name in ("fit", "validate")}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Give every run its checkpoints and its model, in its folder."""
        parser.add_argument("--overwrite", type=bool, default=False, help="Take the place of the run in this folder.")
        parser.add_argument("--save", type=bool, default=True, help="Whether checkpoints and the model are written.")
        parser.add_lightning_class_args(ExportBackbone, "export")
        parser.add_lightning_class_args(ModelCheckpoint, "checkpoint")
        parser.link_arguments("trainer.max_steps", "model.schedule.max_steps", compute_fn=_limit)
        parser.link_arguments("trainer.default_root_dir", "export.folder", compute_fn=model_folder)
        parser.link_arguments("trainer.default_root_dir", "checkpoint.dirpath", compute_fn=checkpoint_folder)

    def _parse_ckpt_path(self) -> None:
        """Lightning would put the checkpoint's options in the place of those given; the module refuses a difference."""

    def before_instantiate_classes(self) -> None:
        """Refuse options of the trainer that make no sense, before anything is loaded."""
        options = self.config[self.subcommand].trainer
        for name, least in LEAST.items():
            check_at_least(least, **{f"trainer.{name}": options[name]})
        check_number(**{"trainer.gradient_clip_val": options.gradient_clip_val})
        for name in ("max_steps", "val_check_interval"):
            if options[name] == 0:
                raise ValueError(f"trainer.{name} is 0, expected more")

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """A trainer that logs to a table in the run's folder, unless a logger is given.

        Raises:
            ValueError: Lightning takes no such devices.
        """
        options = self.config_init[self.subcommand].trainer
        if options.logger in (None, True):
            kwargs["logger"] = CSVLogger(_folder(options.default_root_dir))
        try:
            trainer: Any = super().instantiate_trainer(**kwargs)
        except TypeError as error:
            raise ValueError(f"trainer.devices is {options.devices}: {error}") from error
        if not self.config_init[self.subcommand].save:
            written = (ExportBackbone, ModelCheckpoint)
            trainer.callbacks[:] = [callback for callback in trainer.callbacks if not isinstance(callback, written)]
        return trainer

    def before_fit(self) -> None:
        """Refuse to mix two runs in one folder."""
        options = self.config_init[self.subcommand]
        if options.save and not options.ckpt_path and self.trainer.is_global_zero:
            claim_folder(_folder(options.trainer.default_root_dir), options.overwrite)


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Refuse a folder that holds another run.

    Args:
        folder: Of a run that begins.
        overwrite: Remove the other run's checkpoints instead; its model is replaced at the first export.

    Raises:
        ValueError: It holds another run.
    """
    checkpoints = sorted(checkpoint_folder(folder).glob("*.ckpt"))
    if overwrite:
        for path in checkpoints:
            path.unlink()
    elif checkpoints or (model_folder(folder) / "config.json").exists():
        last = checkpoint_folder(folder) / "last.ckpt"
        resume = f"resume it with --ckpt_path {last}, " if last.exists() else ""
        raise ValueError(
            f"trainer.default_root_dir is {folder}, which holds another run, expected a new folder: name one, "
            f"{resume}or replace it with --overwrite true"
        )


def dispersion_losses() -> list[str]:
    """Names of the dispersion losses.

    >>> dispersion_losses()[:2]
    ['AxisAlignedSlicedDispersion', 'HypersphericalEnergy']
    """
    classes = [value for name in dispersion.__all__ if inspect.isclass(value := getattr(dispersion, name))]
    return [value.__name__ for value in classes if not inspect.isabstract(value)]


def model_folder(folder: str | Path | None) -> Path:
    """Where a run's model is."""
    return _folder(folder) / "model"


def checkpoint_folder(folder: str | Path | None) -> Path:
    """Where a run's checkpoints are."""
    return _folder(folder) / "checkpoints"


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """End with status 2 and a line at an error of the user, with a traceback only if JSONARGPARSE_DEBUG is set."""
    try:
        yield
    except (*EXPECTED, MisconfigurationException, UnpicklingError) as error:
        if os.environ.get("JSONARGPARSE_DEBUG"):
            raise
        sys.stderr.write(f"error: {' '.join(reason_of(str(error)).split())}\n")
        sys.exit(USER_ERROR)


def _folder(folder: str | Path | None) -> Path:
    return Path("." if folder is None else folder)


def _limit(max_steps: int) -> int | None:
    return None if max_steps < 1 else max_steps
