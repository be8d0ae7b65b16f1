"""Sentence indexes as files beside a datastore: NAME.sentences.safetensors and its sealed description."""

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.sentences.dense import DenseSentences
from lightning_knnmt.sentences.encoders import SentenceEncoder
from lightning_knnmt.sentences.report import REMEDY, Likeness, SentencesReport
from lightning_knnmt.sentences.sparse import SparseSentences
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import durable_file, file_sha256
from lightning_knnmt.storage.sealed import write_sealed


def write_sentences(
    path: Path, made: SparseSentences | DenseSentences, by: Likeness, datastore_sha256: str
) -> SentencesReport:
    """Write a sentence index and then its description, each whole or not at all.

    Raises:
        DatastoreError: One could not be written.
    """
    from safetensors.numpy import save

    path.with_suffix(".json").unlink(missing_ok=True)
    with durable_file(path) as file:
        file.write(save(_arrays(made)))
    encoder = made.encoder if isinstance(made, DenseSentences) else None
    names = (None, None) if encoder is None else (encoder.name, encoder.fingerprint)
    report = SentencesReport(by, len(made), datastore_sha256, file_sha256(path), *names)
    write_sealed(path.with_suffix(".json"), asdict(report))
    return report


def read_sentences(
    path: Path, report: SentencesReport, encoder: SentenceEncoder | None
) -> SparseSentences | DenseSentences:
    """Read a sentence index.

    Args:
        path: NAME.sentences.safetensors.
        report: Its description.
        encoder: That of the description, where it names one.

    Raises:
        DatastoreError: It is damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        arrays = load_file(path)
        if report.by in ("bm25", "tf_idf"):
            words = json.loads(arrays["vocabulary"].tobytes().decode())
            vocabulary = {str(word): number for number, word in enumerate(words)}
            parts = {name: arrays[name] for name in ("starts", "sentences", "weights", "asked")}
            made = SparseSentences(vocabulary, **parts, count=report.sentences)
            _check_sparse(made)
            return made
        vectors = arrays["vectors"]
        if vectors.shape[0] != report.sentences or vectors.ndim != 2 or vectors.dtype != np.float16:
            raise ValueError(f"it holds vectors of shape {vectors.shape}, expected {report.sentences}")
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise DatastoreError(f"{path} is damaged ({error}); {REMEDY}") from error
    assert encoder is not None
    return DenseSentences(torch.from_numpy(vectors), encoder)


def _arrays(made: SparseSentences | DenseSentences) -> dict[str, NDArray[np.generic]]:
    if isinstance(made, DenseSentences):
        return {"vectors": made.vectors.numpy()}
    vocabulary = json.dumps(list(made.vocabulary), ensure_ascii=False).encode(errors="replace")
    return {
        "vocabulary": np.frombuffer(vocabulary, np.uint8), "starts": made.starts, "sentences": made.sentences,
        "weights": made.weights, "asked": made.asked,
    }  # fmt: skip


def _check_sparse(made: SparseSentences) -> None:
    """Refuse numbers that lead out of the arrays."""
    terms, weights = len(made.vocabulary), len(made.weights)
    if made.starts.shape != (terms + 1,) or made.asked.shape != (terms,) or made.sentences.shape != (weights,):
        raise ValueError("its arrays have other lengths than its words")
    ordered = (np.diff(made.starts) >= 0).all() and made.starts[0] == 0 and made.starts[-1] == weights
    if not ordered or (weights and not 0 <= made.sentences.min() <= made.sentences.max() < made.count):
        raise ValueError("its numbers lead out of it")
