"""The LightningModule around a pretrained translation model."""

import math

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig

from lightning_knnmt.backbone import Backbone, Batch
from lightning_knnmt.training.schedule import Schedule


class TranslationModule(L.LightningModule):
    """Label-smoothed cross-entropy training of a translation model.

    Args:
        model: Hub name or folder of the model to train.
        schedule: Learning rates.
        label_smoothing: Probability mass spread over the vocabulary.
        src_lang: Language code of the source, for multilingual models.
        tgt_lang: Language code of the target, for multilingual models.
    """

    def __init__(
        self,
        model: str,
        schedule: Schedule,
        label_smoothing: float = 0.1,
        src_lang: str | None = None,
        tgt_lang: str | None = None,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing is {label_smoothing}, expected 0 or more and less than 1")
        self.save_hyperparameters()
        self.schedule = schedule
        self.label_smoothing = label_smoothing
        self.backbone = Backbone(model, src_lang=src_lang, tgt_lang=tgt_lang, device="cpu")  # Lightning moves it
        self.backbone.train()  # Hugging Face loads models for evaluation, and Lightning keeps that

    def states(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Decoder outputs and labels of the batch's N target tokens, shapes (N, D) and (N,)."""
        assert batch.labels is not None
        mask = batch.target_mask
        return self.backbone.keys(batch)[mask], batch.labels[mask]

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Loss per target token."""
        states, labels = self.states(batch)
        loss = F.cross_entropy(self.backbone.project(states), labels, label_smoothing=self.label_smoothing)
        self.log("train/loss", loss.detach(), batch_size=len(labels), prog_bar=True)
        self.log("train/tokens", float(len(labels)), batch_size=1, reduce_fx=torch.sum, on_epoch=True, on_step=False)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Negative log-likelihood per target token, without smoothing."""
        states, labels = self.states(batch)
        loss = F.cross_entropy(self.backbone.project(states).float(), labels)
        self.log("val/loss", loss, batch_size=len(labels), prog_bar=True, sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        """Log the perplexity."""
        loss = self.trainer.callback_metrics.get("val/loss")
        if loss is not None:
            self.log("val/perplexity", math.exp(min(float(loss), 50.0)), prog_bar=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Adam with the schedule's rates."""
        trainable = [parameter for parameter in self.parameters() if parameter.requires_grad]
        optimizer = torch.optim.Adam(trainable, lr=self.schedule.lr, betas=(0.9, 0.98), fused=True)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.schedule.factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
