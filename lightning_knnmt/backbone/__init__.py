"""Pretrained translation models and their keys; the only package that knows Hugging Face model families."""

from lightning_knnmt.backbone.backbone import Backbone, Dtype, KeyTap, KeyType
from lightning_knnmt.backbone.batch import IGNORED, Batch, collate

__all__ = ["IGNORED", "Backbone", "Batch", "Dtype", "KeyTap", "KeyType", "collate"]
