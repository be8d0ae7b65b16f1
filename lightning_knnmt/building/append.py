"""New pairs of a corpus, encoded into further shards of a datastore and added to its indexes."""

import hashlib
import json
import logging
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.change import Change, changing, keep_only, whole_indexes
from lightning_knnmt.building.config import DatastoreConfig
from lightning_knnmt.building.datastore import corpus_sha256, encode_rest
from lightning_knnmt.building.encoder import Tokenized, blocks_of
from lightning_knnmt.building.index import IndexBuild
from lightning_knnmt.building.sentences import carry_sentences
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import ReadReport, read_pairs
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.datastore.manifest import AppendedCorpus, finish_building
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.index.training import Training
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import BUILDING, generation_name

log = logging.getLogger(__name__)

MUCH_LESS_EVEN = 1.25  # growth of the imbalance factor from which on training again is worth it


def append_pairs(model: KeyedModel, config: DatastoreConfig) -> Change:
    """Encode the pairs of a corpus that a datastore lacks, and add their keys to all of its indexes.

    Indexes keep their lists and codes as they were trained. The corpus is read once, and the new pairs are held in
    memory.

    A pair is stored if its source, target and document are. A run that is stopped has changed nothing, and the same
    call continues after its last whole shard.

    Args:
        model: The model that the datastore was built with.
        config: The datastore's folder, the corpus to append, and sizes of batches and shards.

    Raises:
        DatastoreError: The datastore was built with another model, tokenizer, key type or language; one of its indexes
            is not whole; another process writes to it; a file could not be written; or a key is not finite in fp16.
    """
    with changing(config.folder) as store:
        store.check(model)
        reports = whole_indexes(store)
        report = ReadReport()
        given, new = 0, dict[bytes, tuple[int, Pair]]()  # [digest -> place in the corpus, pair]
        for given, pair in enumerate(model.split_pairs(read_pairs(config.corpus, report)), 1):
            new.setdefault(_digest(pair), (given - 1, pair))
        log.info("%s: %s", config.corpus.path, report)
        for shard in store.shards:
            for pair in shard.pairs():
                new.pop(_digest(pair), None)
        change = Change(store.manifest, len(new), given - len(new), reports)
        if new:
            change = _encode(model, config, store, list(new.values()), change)
            with Datastore(config.folder, BUILDING) as grown:
                reports = {name: _extend(store, grown, name, report) for name, report in reports.items()}
                carry_sentences(store, grown, model)
            finish_building(config.folder)
    for name, index in reports.items():
        _advise(name, index)
    return replace(change, indexes=reports)


def _encode(
    model: KeyedModel, config: DatastoreConfig, store: Datastore, new: list[tuple[int, Pair]], change: Change
) -> Change:
    """Write new pairs into further shards, and name these in `building.json`."""
    before = store.manifest
    first = 1 + max((int(shard.file["numbers"][:].max(initial=-1)) for shard in store.shards), default=-1)
    corpus = AppendedCorpus(config.corpus.path.name, corpus_sha256(config.corpus), first, len(new))
    planned = replace(before, generation=before.generation + 1, appended=(*before.appended, corpus))
    begun = _begun(store.folder, planned)
    begun.save(store.folder, BUILDING)
    keep_only(store.folder, before, begun)
    tokenized = Tokenized(model, ((first + place, pair) for place, pair in new[begun.pairs - before.pairs :]))
    shards = blocks_of(tokenized, config.shard_pairs)
    manifest = encode_rest(model, config, begun, shards, total=before.pairs + change.pairs)
    return replace(change, manifest=manifest, cut=tokenized.cut)


def _extend(store: Datastore, grown: Datastore, name: str, report: IndexReport) -> IndexReport:
    """Add the further entries of a datastore to an index, unless a run that was stopped has."""
    config = report.config(name)
    training = replace(Training.plan(grown, config, report.trained_entries), train_points=report.train_points)
    build = IndexBuild(grown, config, training)
    return build.kept() or build.extend(report, generation_name(name, store.manifest.generation))


def _advise(name: str, report: IndexReport) -> None:
    """Warn of an index that no longer fits what it was trained on."""
    reasons = []
    if report.added > report.trained_entries:
        reasons.append(f"{report.added} of its {report.entries} entries came after it was trained")
    now, then = report.imbalance_factor, report.trained_imbalance_factor
    if now is not None and then is not None and now > MUCH_LESS_EVEN * then:
        reasons.append(f"its imbalance factor has grown from {then:.2f} to {now:.2f}")
    if reasons and report.nlist is not None:
        log.warning("index %s: %s; `build_index.py compact` trains it again", name, " and ".join(reasons))


def _begun(folder: Path, planned: Manifest) -> Manifest:
    """The plan with the whole shards that an earlier run of it has left."""
    with suppress(DatastoreError):  # there is none, or it is damaged
        previous = Manifest.load(folder, BUILDING)
        old = len(planned.shards)
        if replace(previous, shards=previous.shards[:old]) == planned:
            for shard in previous.shards[old:]:
                if not shard.is_whole(folder):
                    break
                planned = planned.with_shard(shard)
    return planned


def _digest(pair: Pair) -> bytes:
    return hashlib.blake2b(json.dumps([pair.src, pair.tgt, pair.document]).encode(), digest_size=16).digest()
