"""Pretrained models and their keys; the only package that knows Hugging Face model families."""
