"""Datastores that change after they were built: pairs are appended, and what was removed is cleared away.

A change writes new shards and indexes beside those in use, with its manifest in `building.json`. All of them come into
force at once when that is renamed to `manifest.json`; until then the datastore is what it was before.
"""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.appending import encode_new
from lightning_knnmt.building.compaction import compact_shards, needs_copying
from lightning_knnmt.building.datastore import DatastoreConfig
from lightning_knnmt.building.index import IndexBuild, plan_training
from lightning_knnmt.building.leftovers import remove_leftovers
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.datastore.manifest import BUILDING, finish_building
from lightning_knnmt.index.factory import check_sample, make_index
from lightning_knnmt.index.faiss_index import FaissIndex, read_index, write_index
from lightning_knnmt.index.opening import read_report
from lightning_knnmt.index.report import IndexPart, IndexReport
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import durable_file
from lightning_knnmt.storage.layout import find_indexes, generation_name, index_file, part_file
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.ranks import Ranks

log = logging.getLogger(__name__)

MUCH_LESS_EVEN = 1.25  # growth of the imbalance factor from which on training again is worth it


@dataclass(frozen=True)
class Change:
    """What appending or compacting has led to.

    Attributes:
        manifest: Of the datastore, which is the same if nothing was to do.
        pairs: Pairs that were appended, or taken out for good.
        known: Pairs that were not appended, since they are stored.
        indexes: What is said of each index now, by name.
    """

    manifest: Manifest
    pairs: int
    known: int
    indexes: dict[str, IndexReport]


def append_pairs(backbone: KeyedModel, config: DatastoreConfig) -> Change:
    """Encode the pairs of a corpus that a datastore lacks, and add their keys to all of its indexes.

    Indexes keep their lists and codes as they were trained.

    A pair is stored if its source, target and document are. A run that is stopped has changed nothing, and the same
    call continues after its last whole shard.

    Args:
        backbone: The model that the datastore was built with.
        config: The datastore's folder, the corpus to append, and sizes of batches and shards.

    Raises:
        DatastoreError: The datastore was built with another model, tokenizer, key type or language; one of its indexes
            is not whole; another process writes to it; or a file could not be written.
    """
    with _writing(config.folder) as store:
        store.check(backbone)
        reports = _whole_indexes(store)
        new = encode_new(backbone, config, store)
        if new.pairs:
            with Datastore(config.folder, BUILDING) as grown:
                reports = {name: _extend(store, grown, name, report) for name, report in reports.items()}
            finish_building(config.folder)
    for name, report in reports.items():
        _advise(name, report)
    return Change(new.manifest, new.pairs, new.known, reports)


def compact(folder: Path) -> Change:
    """Write a datastore anew without what was removed, in as few shards as can be, and train its indexes again.

    A run that is stopped has changed nothing; the same call starts again.

    Args:
        folder: The datastore's.

    Raises:
        DatastoreError: One of its indexes is not whole, another process writes to it, or a file could not be written.
        ValueError: What is left does not suffice to train an index.
    """
    with _writing(folder) as store:
        before, reports = store.manifest, _whole_indexes(store)
        if not needs_copying(store) and not any(report.added for report in reports.values()):
            return Change(before, 0, 0, reports)
        left = len(store) - len(store.removed)
        for name, report in reports.items():
            training = plan_training(store, report.config(name), left)
            check_sample(make_index(training.factory, store.key_size), training.factory, training.train_points, left)
        manifest = compact_shards(store)
        with Datastore(folder, BUILDING) as compacted:
            for name, report in reports.items():
                config = report.config(name)
                build = IndexBuild(compacted, config, plan_training(compacted, config, left), Ranks())
                reports[name] = build.kept() or build.make()
        finish_building(folder)
    return Change(manifest, before.pairs - manifest.pairs, 0, reports)


@contextmanager
def _writing(folder: Path) -> Iterator[Datastore]:
    """A datastore that is open and that nobody else changes; what a change has left behind is removed in the end."""
    Manifest.load(folder)  # before the lock, for which a folder would be made
    with only_writer(folder):
        with Datastore(folder) as store:
            yield store
        (folder / BUILDING).unlink(missing_ok=True)
        remove_leftovers(folder, Manifest.load(folder))


def _whole_indexes(store: Datastore) -> dict[str, IndexReport]:
    """What is said of each index.

    Raises:
        DatastoreError: One is not whole, or belongs to another datastore.
    """
    reports = {}
    for name in find_indexes(store.folder, store.manifest.generation):
        reports[name] = read_report(store, name)
        path = index_file(store.folder, generation_name(name, store.manifest.generation))
        if (damaged := reports[name].damaged(path)) is not None:
            raise DatastoreError(f"{damaged} is missing or damaged; build the index again before this")
    return reports


def _extend(store: Datastore, grown: Datastore, name: str, report: IndexReport) -> IndexReport:
    """Add the further entries of a datastore to an index: to its only file, or as a part of their own."""
    config = report.config(name)
    training = replace(plan_training(grown, config, report.trained_entries), train_points=report.train_points)
    build = IndexBuild(grown, config, training, Ranks())
    if (kept := build.kept()) is not None:
        return kept
    folder, before = store.folder, generation_name(name, store.manifest.generation)
    entries = range(len(store), len(grown))
    index = read_index(index_file(folder, before))
    build.add(index, grown.key_chunks(config.chunk, entries), len(entries), f"add to {name}")
    if report.parts:
        _link(index_file(folder, before), build.path)
        for number in range(len(report.parts)):
            _link(part_file(folder, before, number), part_file(folder, build.name, number))
        sha256 = write_index(index, part_file(folder, build.name, len(report.parts)))
        parts = (*report.parts, IndexPart(len(entries), sha256))
        files = (part_file(folder, build.name, number) for number in range(len(parts)))
        extended = build.report(map(FaissIndex.load, files), report.faiss_sha256, parts)
    else:
        extended = build.report([FaissIndex(index)], write_index(index, build.path), ())
    extended = replace(
        extended,
        seconds=report.seconds,
        added=report.added + len(entries),
        trained_imbalance_factor=report.trained_imbalance_factor if report.added else report.imbalance_factor,
    )
    extended.save(build.description)
    build.clean(extended)
    return extended


def _link(file: Path, to: Path) -> None:
    """Give a file that is never written to a second name, or copy it where a disk has no links."""
    to.unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError:
        with durable_file(to) as copy, file.open("rb") as original:
            shutil.copyfileobj(original, copy)


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
