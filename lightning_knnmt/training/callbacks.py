"""What happens beside training."""

from pathlib import Path
from typing import Any

import lightning as L

from lightning_knnmt.training.module import TranslationModule


class ExportBackbone(L.Callback):
    """Write the model as a Hugging Face folder after each validation of a training that is the best so far.

    The weights of the last step are validated, and so written, whatever the interval of validations is.

    Args:
        folder: Where `model.safetensors`, its configuration and the tokenizer go.
        monitor: Logged value to minimise; None: write after every validation.

    Raises:
        ValueError: At the first validation: nothing of that name is logged.
    """

    def __init__(self, folder: Path, monitor: str | None = "val/loss") -> None:
        self.folder, self.monitor = folder, monitor
        self.best = float("inf")

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        """Have the last step validated, as Lightning does for a training that is stopped early."""
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the model if it is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        if self.monitor is not None and self.monitor not in trainer.callback_metrics:
            logged = ", ".join(sorted(trainer.callback_metrics))
            raise ValueError(f"export.monitor is {self.monitor!r}, expected one of what is logged: {logged}")
        value = float("-inf") if self.monitor is None else float(trainer.callback_metrics[self.monitor])
        if value <= self.best:
            self.best = value
            if trainer.is_global_zero and isinstance(pl_module, TranslationModule):
                pl_module.backbone.save(self.folder)

    def state_dict(self) -> dict[str, float]:
        """The best value, so that a resumed run does not export a worse model."""
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        """Restore the best value."""
        self.best = state_dict["best"]
