"""Documents taken out of a datastore."""

from collections.abc import Collection
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.manifest import Manifest
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.datastore.store import Datastore
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import MANIFEST, removed_file, removed_number
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.sealed import read_sealed, write_sealed


@dataclass(frozen=True)
class Removal:
    """What removing has led to.

    Attributes:
        pairs: Pairs that were removed now.
        entries: Their entries.
        removed: Entries that are removed in all and still take room.
        total: Entries of the datastore, those counted.
    """

    pairs: int
    entries: int
    removed: int
    total: int


def remove_documents(folder: Path, documents: Collection[str]) -> Removal:
    """Remove all pairs of some documents: no index finds their entries any more, from the next time it is opened.

    Shards and indexes stay as they are: a small file says which entries are gone. Documents that are removed already
    are no error.

    Args:
        folder: The datastore's.
        documents: Their names as they are stored with the pairs.

    Raises:
        DatastoreError: There is no such document, or another process writes to the datastore.
    """
    if "" in documents:
        raise DatastoreError("document is '', expected the name of one: pairs without a document cannot be told apart")
    Manifest.load(folder)  # before the lock, for which a folder would be made
    with only_writer(folder), Datastore(folder) as store:
        wanted, known, pairs = set(documents), set[str](), 0
        starts, stops = [store.removed.starts], [store.removed.stops]
        for shard in store.shards:
            names = shard.file["document"].asstr()[:]
            known.update(names)
            gone: NDArray[np.bool_] = shard.kept & np.fromiter((name in wanted for name in names), bool, len(names))
            pairs += int(gone.sum())
            starts.append(shard.first + shard.starts[:-1][gone])
            stops.append(shard.first + shard.starts[1:][gone])
        if unknown := sorted(wanted - known):
            raise DatastoreError("; ".join(_unknown(folder, name, known) for name in unknown))
        removed = Removed.of(np.concatenate(starts), np.concatenate(stops)) if pairs else store.removed
        if pairs:
            _save(folder, store.manifest, removed)
        return Removal(pairs, len(removed) - len(store.removed), len(removed), len(store))


def _save(folder: Path, manifest: Manifest, removed: Removed) -> None:
    before = manifest.removed
    number = 0 if before is None else removed_number(before.file) or 0
    info = removed.save(folder, removed_file(number + 1))
    content = read_sealed(folder / MANIFEST)  # as it is: indexes know the checksum of the rest
    content["removed"] = {"file": info.file, "entries": info.entries, "sha256": info.sha256}
    write_sealed(folder / MANIFEST, content)
    if before is not None:
        (folder / before.file).unlink(missing_ok=True)


def _unknown(folder: Path, name: str, known: set[str]) -> str:
    close = get_close_matches(name, sorted(known), n=3)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"it has {len(known)} documents"
    return f"{folder} has no document {name!r}: {hint}"
