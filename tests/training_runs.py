"""Trainings by the command line, and what they leave behind."""

import csv
from collections.abc import Sequence
from pathlib import Path

import torch
from tiny_stores import corpus_pairs
from torch import Tensor

import train
from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.splits import write_splits

ROOT = Path(__file__).parent.parent
PAIRS = corpus_pairs(48)


def data_options(folder: Path, training: Sequence[Pair], validation: Sequence[Pair]) -> list[str]:
    """Write two splits and return the options that name them."""
    write_splits(folder, {"train": training, "validation": validation, "test": []}, {})
    return [f"--data.train={folder}/train.jsonl", f"--data.validation={folder}/validation.jsonl"]


def fit(folder: Path, model: Path, data: list[str], *options: str, steps: int = 4) -> list[dict[str, float]]:
    """Train by the command line and return the rows that were logged; the last weights are in `folder`/model."""
    arguments = [
        "fit",
        f"--model.backbone.model={model}",
        *("--model.schedule.lr=0.01", "--model.schedule.warmup_steps=1", "--data.max_tokens=100"),
        *data,
        *(f"--trainer.max_steps={steps}", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        *("--trainer.num_sanity_val_steps=0", "--trainer.gradient_clip_val=null", "--seed_everything=3"),
        *("--trainer.logger=CSVLogger", f"--trainer.logger.save_dir={folder}"),
        *("--trainer.logger.name=", "--trainer.logger.version=", f"--trainer.default_root_dir={folder}"),
        *("--checkpoint.filename={step}", "--checkpoint.every_n_train_steps=1", "--checkpoint.save_top_k=-1"),
        "--export.monitor=null",
        *options,
    ]  # fmt: skip
    train.main(arguments)
    return logged(folder)


def logged(folder: Path) -> list[dict[str, float]]:
    """The rows of the CSV logger in a folder."""
    with (folder / "metrics.csv").open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def column(rows: list[dict[str, float]], name: str) -> list[float]:
    """What was logged under a name, row by row."""
    return [row[name] for row in rows if name in row]


def batch_of(backbone: KeyedModel) -> Batch:
    """The validation pairs."""
    return backbone.batch([pair.src for pair in PAIRS[40:]], [pair.tgt for pair in PAIRS[40:]])


def logits_of(backbone: KeyedModel) -> Tensor:
    """Logits of the validation pairs' tokens, shape (N, V)."""
    with torch.inference_mode():
        batch = batch_of(backbone)
        return backbone.keys_and_logits(batch)[1][batch.target_mask]
