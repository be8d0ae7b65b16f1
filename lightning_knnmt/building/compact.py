"""A datastore written anew without what was removed from it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lightning_knnmt.building.change import Change, changing, keep_only, whole_indexes
from lightning_knnmt.building.copying import Copying, check_whole
from lightning_knnmt.building.index import IndexBuild
from lightning_knnmt.building.sentences import carry_sentences
from lightning_knnmt.datastore.manifest import Manifest, finish_building
from lightning_knnmt.datastore.store import Datastore
from lightning_knnmt.index.training import Training
from lightning_knnmt.storage.layout import BUILDING


def compact(folder: Path) -> Change:
    """Write a datastore anew without what was removed, in as few shards as can be, and train its indexes again.

    Keys are copied, not encoded again. A run that is stopped has changed nothing; the same call starts again.

    Args:
        folder: The datastore's.

    Raises:
        DatastoreError: One of its indexes is not whole, another process writes to it, or a file could not be written.
        ValueError: What is left does not suffice to train an index.
    """
    with changing(folder) as store:
        before, reports = store.manifest, whole_indexes(store)
        if not _needs_copying(store) and not any(report.added for report in reports.values()):
            return Change(before, 0, 0, reports)
        left = len(store) - len(store.removed)
        for name, report in reports.items():
            Training.plan(store, report.config(name), left).check(left)
        manifest = _compact_shards(store)
        with Datastore(folder, BUILDING) as compacted:
            for name, report in reports.items():
                config = report.config(name)
                build = IndexBuild(compacted, config, Training.plan(compacted, config, left))
                reports[name] = build.kept() or build.make()
            carry_sentences(store, compacted)
        finish_building(folder)
    return Change(manifest, before.pairs - manifest.pairs, 0, reports)


def _compact_shards(store: Datastore) -> Manifest:
    """Copy the pairs that were not removed into shards that are as full as they can be, and say so in `building.json`.

    Keys are copied, not encoded again, and pairs keep their order and their numbers in the corpus. Nothing that the
    datastore has is touched. Shards that would hold the same pairs as before are kept.

    Args:
        store: The datastore, to which nobody else writes.

    Raises:
        DatastoreError: A shard is damaged, or a file could not be written.
    """
    folder, before = store.folder, store.manifest
    compacted = replace(before, generation=before.generation + 1, removed=None)
    keep_only(folder, before, replace(compacted, shards=()))
    if _needs_copying(store):
        check_whole(store)
        copying = _copying(store)
        compacted = replace(compacted, shards=())
        progress = tqdm(total=len(store) - len(store.removed), desc="copy", unit=" entries", unit_scale=True)
        with progress:
            for number, rows in enumerate(copying.groups()):
                shard = copying.write(folder / before.next_shard(number), rows)
                compacted = compacted.with_shard(shard)
                progress.update(shard.entries)
    compacted.save(folder, BUILDING)
    return compacted


def _copying(store: Datastore) -> Copying:
    return Copying(store, ~store.removed.covers(np.arange(len(store))))


def _needs_copying(store: Datastore) -> bool:
    """Whether entries were removed, or shards can be put together."""
    return store.manifest.removed is not None or sum(1 for _ in _copying(store).groups()) < len(store.manifest.shards)
