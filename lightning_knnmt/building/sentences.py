"""Sentence indexes of a datastore: made, and kept up when it changes."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.config import SentencesConfig
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.manifest import read_manifest
from lightning_knnmt.sentences.dense import DenseSentences
from lightning_knnmt.sentences.encoders import SentenceEncoder, StatesEncoder, TransformersEncoder
from lightning_knnmt.sentences.report import Likeness, SentencesReport
from lightning_knnmt.sentences.sparse import SparseSentences, bm25, tf_idf
from lightning_knnmt.sentences.stored import read_sentences, write_sentences
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import find_sentences, generation_name, sentences_file
from lightning_knnmt.storage.lock import only_writer

log = logging.getLogger(__name__)


def build_sentences(store: Datastore, config: SentencesConfig, model: KeyedModel | None = None) -> SentencesReport:
    """Make a sentence index over the sources of a datastore, in the order in which they are stored.

    Args:
        store: The datastore.
        config: How sentences are compared.
        model: The model that the datastore was built with, for `by: states`.

    Raises:
        DatastoreError: One of that name is there that was made otherwise, the datastore was built with another model,
            or another process writes to it.
        ValueError: A model is missing, or has no encoder.
    """
    if config.by == "states" and model is None:
        raise ValueError("by is 'states', expected the model that the datastore was built with (--backbone.model)")
    if model is not None:
        store.check(model)
    with only_writer(store.folder):
        if read_manifest(store.folder)[1] != store.fingerprint:
            raise DatastoreError(f"{store.folder} was changed after it was opened; open it again")
        path = _path(store, config.name)
        if not config.overwrite and (kept := _kept(path, store, config)) is not None:
            return kept
        encoder = _encoder(config.by, config.encoder, model)
        return write_sentences(path, _made(config.by, _sources(store), encoder), config.by, store.fingerprint)


def carry_sentences(
    store: Datastore, changed: Datastore, model: KeyedModel | None = None
) -> dict[str, SentencesReport]:
    """Make the sentence indexes of a datastore anew for what a change has made of it; vectors are kept.

    One that cannot be made, since its encoder is gone, is left out, with a warning that says what to do.

    Args:
        store: The datastore as it was.
        changed: As it will be: with more sentences behind the others, or without those that were removed.
        model: The model that it was built with, if there are more.
    """
    reports = {}
    for name in find_sentences(store.folder, store.manifest.generation):
        try:
            reports[name] = _carried(store, changed, name, model)
        except (DatastoreError, OSError, ValueError, ImportError) as error:
            log.warning(
                "the sentence index %s is left behind (%s); make it again: build_index.py sentences %s --name %s",
                name, error, store.folder, name,
            )  # fmt: skip
    return reports


def _carried(store: Datastore, changed: Datastore, name: str, model: KeyedModel | None) -> SentencesReport:
    path = _path(store, name)
    report = SentencesReport.load(path)
    if report.datastore_sha256 != store.fingerprint or report.problem(path) is not None:
        raise DatastoreError(f"{path} is stale or damaged")
    config = SentencesConfig(report.by, name, report.encoder if report.by == "encoder" else None)  # type: ignore[arg-type]
    if (kept := _kept(_path(changed, name), changed, config)) is not None:  # of a run that was stopped
        return kept
    sources = _sources(changed)
    if report.by in ("bm25", "tf_idf"):
        made = _made(config.by, sources, None)
        return write_sentences(_path(changed, name), made, config.by, changed.fingerprint)
    before = read_sentences(path, report, _Named(report.encoder or "", report.encoder_sha256 or ""))
    assert isinstance(before, DenseSentences)
    rows = np.concatenate([np.empty(0, bool), *(shard.kept for shard in store.shards)])
    vectors = before.vectors if len(sources) >= len(rows) else before.vectors[torch.from_numpy(rows)]
    encoder: SentenceEncoder = before.encoder
    if more := sources[len(vectors) :]:
        encoder = _encoder(config.by, config.encoder, model) or encoder
        if encoder.fingerprint != report.encoder_sha256:
            raise DatastoreError(f"the encoder {encoder.name} is another than that of the stored vectors")
        vectors = torch.cat([vectors, encoder.encode(more).half()])
    made = DenseSentences(vectors, encoder)
    return write_sentences(_path(changed, name), made, config.by, changed.fingerprint)


@dataclass
class _Named:
    """An encoder by its name, where vectors are there already."""

    name: str
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> torch.Tensor:
        """No text has a vector yet that is not stored."""
        raise ValueError(f"the encoder {self.name} is not loaded, expected no texts to encode")


def _made(by: Likeness, sources: list[str], encoder: SentenceEncoder | None) -> SparseSentences | DenseSentences:
    if encoder is None:
        return bm25(sources) if by == "bm25" else tf_idf(sources)
    return DenseSentences(encoder.encode(sources).half(), encoder)


def _encoder(by: Likeness, name: str | None, model: KeyedModel | None) -> SentenceEncoder | None:
    if by == "states":
        if model is None:
            raise ValueError("by is 'states', expected the model that the datastore was built with")
        return StatesEncoder(model)
    return None if name is None else TransformersEncoder(name)


def _kept(path: Path, store: Datastore, config: SentencesConfig) -> SentencesReport | None:
    """The description of the sentence index that makes building needless; None if there is none."""
    try:
        report = SentencesReport.load(path)
    except DatastoreError:
        return None
    if report.datastore_sha256 != store.fingerprint or report.problem(path) is not None:
        return None
    there, wanted = (report.by, report.encoder), (config.by, config.encoder)
    if report.by != config.by or (config.by == "encoder" and there != wanted):
        raise DatastoreError(
            f"{path} already holds another sentence index: {there} against {wanted} (there against wanted); choose "
            "another name, or give --overwrite true"
        )
    log.info("%s is already there: %s over %d sentences", path, report.by, report.sentences)
    return report


def _path(store: Datastore, name: str) -> Path:
    return sentences_file(store.folder, generation_name(name, store.manifest.generation))


def _sources(store: Datastore) -> list[str]:
    """The source of every pair, those that were removed included."""
    return [text for shard in store.shards for text in shard.file["src"].asstr()[:]]
