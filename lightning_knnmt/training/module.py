"""The LightningModule around a pretrained translation model."""

import logging
import math
from dataclasses import asdict, replace
from typing import Any, Literal, cast, get_args

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.checks import check_at_least, check_number, check_one_of
from lightning_knnmt.dispersion import Dispersion
from lightning_knnmt.training.resuming import check_same_options
from lightning_knnmt.training.schedule import Schedule
from lightning_knnmt.training.stored_states import StateBatch

log = logging.getLogger(__name__)

Trainable = Literal["all", "last_block", "adapters"]
SMOOTHING_HURTS = 1.5  # times the plain loss


class TranslationModule(L.LightningModule):
    """Label-smoothed cross-entropy training of a translation model, with dispersion of its keys (arXiv 2509.16729).

    The loss is L_MT + γ L_disp, both averaged per target token; L_disp acts on the directions of the decoder outputs.
    A resumed run draws the same random numbers as one that was never interrupted.

    Args:
        backbone: The model to train, with `decoder_output` keys and float32 weights; Lightning chooses its device
            (`--trainer.accelerator`) and precision (`--trainer.precision`).
        schedule: Learning rates.
        label_smoothing: Probability mass spread over the vocabulary.
        trainable: `all`; `last_block`: its feed-forward layers, the final norm and the output projection, untied from
            the embeddings; `adapters`: low-rank adapters on the same layers, and the norm. What is frozen runs without
            a graph and without dropout.
        adapter_rank: Rank of the adapters.
        dispersion: Loss that spreads the keys; None: none.
        gamma: Its weight γ; 0: it is only logged.

    Raises:
        ValueError: An option is out of range, or does not fit training or the model.
        OSError: There is no such model.
    """

    def __init__(
        self,
        backbone: BackboneConfig,
        schedule: Schedule,
        label_smoothing: float = 0.1,
        trainable: Trainable = "all",
        adapter_rank: int = 16,
        dispersion: Dispersion | None = None,
        gamma: float = 1.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 or more and less than 1")
        check_one_of(get_args(Trainable), trainable=trainable)
        check_at_least(1, adapter_rank=adapter_rank)
        check_number(gamma=gamma)
        _check_trainable(backbone)
        self.save_hyperparameters(ignore=["backbone", "schedule", "dispersion"])
        self.save_hyperparameters(  # as plain values, for loggers and checkpoints
            {
                "backbone": asdict(backbone),
                "schedule": asdict(schedule),
                "dispersion": None if dispersion is None else dispersion.configuration,
            }
        )
        self.schedule = schedule
        self.label_smoothing = label_smoothing
        self.dispersion = dispersion
        self.gamma = gamma
        self.backbone = replace(backbone, device="cpu").load()  # Lightning moves it
        if trainable != "all":
            if not isinstance(self.backbone, PretrainedModel):
                raise ValueError(
                    f"trainable is {trainable!r}, expected 'all' for a {type(self.backbone).__name__}, "
                    "which is no PretrainedModel"
                )
            self.backbone.freeze_below_output(adapter_rank if trainable == "adapters" else None)
        self.backbone.train()  # Hugging Face loads models for evaluation, and Lightning keeps that

    def on_fit_start(self) -> None:
        """Remember the seed of the run."""
        self._seed = torch.initial_seed()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on from a run that had other options."""
        check_same_options(checkpoint.get("hyper_parameters", {}), dict(self.hparams))

    def on_train_batch_start(self, batch: Batch | StateBatch, batch_idx: int) -> None:
        """Seed dropout and the dispersion's draws by run, step and process, so that a resumed run draws them again."""
        sequence = np.random.SeedSequence((self._seed, self.global_step, batch_idx, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1)[0]))

    def states(self, batch: Batch | StateBatch) -> tuple[Tensor, Tensor]:
        """Decoder outputs and labels of the batch's N target tokens, shapes (N, D) and (N,)."""
        if isinstance(batch, StateBatch):
            return cast(PretrainedModel, self.backbone).outputs(batch.states), batch.labels
        assert batch.labels is not None
        mask = batch.target_mask
        return self.backbone.keys(batch)[mask], batch.labels[mask]

    def training_step(self, batch: Batch | StateBatch, batch_idx: int) -> Tensor:
        """Loss per target token."""
        states, labels = self.states(batch)
        logits = self.backbone.project(states).float()
        translation = loss = F.cross_entropy(logits, labels, label_smoothing=self.label_smoothing)
        if self.label_smoothing and self.global_step == 0 and batch_idx == 0 and self.global_rank == 0:
            self._warn_of_smoothing(float(translation.detach()), float(F.cross_entropy(logits.detach(), labels)))
        self.log("train/translation_loss", translation.detach(), batch_size=len(labels))
        if self.dispersion is not None:
            spread = self.dispersion(states)
            loss = translation + self.gamma * spread
            self.log("train/dispersion", spread.detach(), batch_size=len(labels))
            every = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
            if every and (self.global_step + 1) % every == 0:
                self._log_gradients(states, {"translation": translation, "dispersion": spread})
        self.log("train/loss", loss.detach(), batch_size=len(labels), prog_bar=True)
        self.log("train/tokens", float(len(labels)), batch_size=1, reduce_fx=torch.sum, on_epoch=True, on_step=False)
        return loss

    def _warn_of_smoothing(self, smoothed: float, plain: float) -> None:
        """Say if the model was trained, or distilled, without label smoothing: it would be ruined."""
        if smoothed > SMOOTHING_HURTS * plain:
            log.warning(
                "label_smoothing is %s, with which the loss begins at %.2f, without it at %.2f: the model was trained "
                "without and would lose what it knows; set --model.label_smoothing 0",
                self.label_smoothing, smoothed, plain,
            )  # fmt: skip

    def _log_gradients(self, states: Tensor, losses: dict[str, Tensor]) -> None:
        """Log the norm of each loss's own gradient, γ not included, at the decoder outputs, where the losses meet.

        That is a backward pass through the output projection alone, and only in steps that are logged.
        """
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, states, retain_graph=True)
            self.log(f"train/{name}_gradient", gradient.float().norm(), batch_size=len(states))

    def validation_step(self, batch: Batch | StateBatch, batch_idx: int) -> dict[str, Tensor]:
        """Log the negative log-likelihood per target token, without smoothing.

        Returns:
            `keys`, shape (N, D), and their `tokens`, shape (N,), for callbacks.
        """
        states, labels = self.states(batch)
        loss = F.cross_entropy(self.backbone.project(states).float(), labels)
        self.log("val/loss", loss, batch_size=len(labels), prog_bar=True, sync_dist=True)
        return {"keys": states, "tokens": labels}

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity."""
        loss = self.trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self.log("val/perplexity", math.exp(min(float(loss), 50.0)), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with the schedule's rates."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        # In mixed precision, Lightning refuses to clip the gradients of a fused optimizer, which scales them itself.
        fused = not self._in_mixed_precision()
        optimizer = torch.optim.Adam(trainable, lr=self.schedule.lr, betas=(0.9, 0.98), fused=fused)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def _in_mixed_precision(self) -> bool:
        try:
            return str(cast(Any, self.trainer).precision).endswith("mixed")
        except RuntimeError:  # there is no trainer yet
            return False


def _check_trainable(config: BackboneConfig) -> None:
    """Refuse options of a model that are for decoding only."""
    if config.key_type != "decoder_output":
        raise ValueError(
            f"backbone.key_type is {config.key_type!r}, expected 'decoder_output': these are the keys that the output "
            "projection sees, and that dispersion spreads"
        )
    if config.device not in ("auto", "cpu"):
        raise ValueError(
            f"backbone.device is {config.device!r}, expected 'auto': Lightning chooses the device of a training, by "
            "--trainer.accelerator"
        )
    if config.dtype != "float32":
        raise ValueError(
            f"backbone.dtype is {config.dtype!r}, expected 'float32': Lightning chooses the precision of a training, "
            "by --trainer.precision bf16-mixed"
        )
