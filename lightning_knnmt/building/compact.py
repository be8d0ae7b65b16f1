"""A datastore written anew without what was removed from it."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.building.change import Change, changing, keep_only, whole_indexes
from lightning_knnmt.building.encoder import cut
from lightning_knnmt.building.index import IndexBuild
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore.manifest import Manifest, ShardInfo, finish_building
from lightning_knnmt.datastore.shard import TEXTS, ShardWriter
from lightning_knnmt.datastore.store import Datastore, StoredShard
from lightning_knnmt.index.training import Training
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import BUILDING

COPIED_AT_ONCE = 65536  # entries

Row = tuple[int, int, int]  # shard, pair within it, the pair's entries


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
        _check_whole(store)
        compacted = replace(compacted, shards=())
        progress = tqdm(total=len(store) - len(store.removed), desc="copy", unit=" entries", unit_scale=True)
        with progress:
            for number, rows in enumerate(_groups(store)):
                shard = _write(store, before.next_shard(number), rows)
                compacted = compacted.with_shard(shard)
                progress.update(shard.entries)
    compacted.save(folder, BUILDING)
    return compacted


def _check_whole(store: Datastore) -> None:
    """Refuse to copy damaged keys, which would get a checksum that fits."""
    for shard in store.manifest.shards:
        if not shard.is_whole(store.folder):
            raise DatastoreError(f"{store.folder / shard.file} is damaged (its checksum is another); restore it first")


def _needs_copying(store: Datastore) -> bool:
    """Whether entries were removed, or shards can be put together."""
    return store.manifest.removed is not None or sum(1 for _ in _groups(store)) < len(store.manifest.shards)


def _groups(store: Datastore) -> Iterator[list[Row]]:
    """The pairs of each shard to be written."""
    rows = (
        (number, pair, entries)
        for number, shard in enumerate(store.shards)
        for pair, entries in zip(np.flatnonzero(shard.kept).tolist(), _lengths(shard)[shard.kept].tolist(), strict=True)
    )
    return cut(rows, lambda row: row[2], store.manifest.shard_entries)


def _lengths(shard: StoredShard) -> NDArray[np.int64]:
    return np.diff(shard.starts)


def _write(store: Datastore, name: str, rows: list[Row]) -> ShardInfo:
    path, entries = store.folder / name, sum(row[2] for row in rows)
    with ShardWriter(path, entries, len(rows), store.key_size) as writer:
        for number, group in groupby(rows, lambda row: row[0]):
            pairs = np.array([pair for _, pair, _ in group])
            _copy(store.shards[number], pairs, writer)
    return ShardInfo(name, entries, len(rows), file_sha256(path))


def _copy(shard: StoredShard, pairs: NDArray[np.int64], writer: ShardWriter) -> None:
    """Append some pairs, in ascending order, a block at a time."""
    blocks = shard.starts[pairs] // COPIED_AT_ONCE
    cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(pairs)]
    for low, high in pairwise(cuts):
        chosen = pairs[low:high]
        span = slice(int(chosen[0]), int(chosen[-1]) + 1)
        entries = slice(int(shard.starts[span.start]), int(shard.starts[span.stop]))
        wanted = np.zeros(span.stop - span.start, bool)
        wanted[chosen - span.start] = True
        lengths = _lengths(shard)[span]
        keys = np.repeat(wanted, lengths)
        texts = (shard.file[text].asstr()[span][wanted] for text in TEXTS)
        writer.append(
            shard.file["keys"][entries][keys], shard.file["values"][entries][keys], lengths[wanted].tolist(),
            [Pair(*each) for each in zip(*texts, strict=True)], shard.file["numbers"][span][wanted].tolist(),
        )  # fmt: skip
