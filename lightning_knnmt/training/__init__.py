"""Training: the LightningModule, its learning-rate schedule, resumable batches and callbacks."""

from lightning_knnmt.training.callbacks import ExportBackbone
from lightning_knnmt.training.index_health import IndexHealth
from lightning_knnmt.training.module import TranslationModule
from lightning_knnmt.training.schedule import Schedule

__all__ = ["ExportBackbone", "IndexHealth", "Schedule", "TranslationModule"]
