"""Pretrained translation models and their keys; the only package that knows Hugging Face model families."""

import lightning_knnmt.backbone.firefox  # noqa: F401, makes the family known to Hugging Face's Auto classes
from lightning_knnmt.backbone.backbone import Backbone, Dtype, KeyType
from lightning_knnmt.backbone.batch import IGNORED, Batch, collate
from lightning_knnmt.backbone.tap import KeyTap

__all__ = ["IGNORED", "Backbone", "Batch", "Dtype", "KeyTap", "KeyType", "collate"]
