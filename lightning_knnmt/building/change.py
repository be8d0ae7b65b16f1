"""Datastores that change after they were built: pairs are appended, and what was removed is cleared away.

A change writes new shards and indexes beside those in use, with its manifest in `building.json`. All of them come into
force at once when that is renamed to `manifest.json`; until then the datastore is what it was before.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.index.opening import read_report
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import BUILDING, find_indexes, generation_name, index_file, remove_others
from lightning_knnmt.storage.lock import only_writer


@dataclass(frozen=True)
class Change:
    """What appending or compacting has led to.

    Attributes:
        manifest: Of the datastore, which is the same if nothing was to do.
        pairs: Pairs that were appended, or taken out for good.
        known: Pairs that were not appended, since they are stored.
        indexes: The description of each index, by name.
        cut: Texts that were appended and were longer than the model's positions.
    """

    manifest: Manifest
    pairs: int
    known: int
    indexes: dict[str, IndexReport]
    cut: int = 0


@contextmanager
def changing(folder: Path) -> Iterator[Datastore]:
    """A datastore that is open and that nobody else changes; what a change has left behind is removed in the end."""
    Manifest.load(folder)  # before the lock, for which a folder would be made
    with only_writer(folder):
        with Datastore(folder, checksums=False) as store:  # what a change copies, it compares
            yield store
        (folder / BUILDING).unlink(missing_ok=True)
        keep_only(folder, Manifest.load(folder))


def keep_only(folder: Path, *manifests: Manifest) -> None:
    """Remove shards, indexes and lists of removed entries that belong to none of some manifests."""
    shards = {shard.file for manifest in manifests for shard in manifest.shards}
    removed = {manifest.removed.file for manifest in manifests if manifest.removed is not None}
    remove_others(folder, shards, removed, {manifest.generation for manifest in manifests})


def whole_indexes(store: Datastore) -> dict[str, IndexReport]:
    """The description of each index.

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
