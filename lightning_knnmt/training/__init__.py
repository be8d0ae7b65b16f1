"""Training: the LightningModule, its learning-rate schedule and its callbacks."""

from lightning_knnmt.training.callbacks import ExportBackbone
from lightning_knnmt.training.module import TranslationModule
from lightning_knnmt.training.schedule import Schedule

__all__ = ["ExportBackbone", "Schedule", "TranslationModule"]
