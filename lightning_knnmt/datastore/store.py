"""A built datastore, open for reading."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.data.pairs import Pair, StoredContext
from lightning_knnmt.datastore.manifest import Provenance, read_manifest
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.datastore.shard import map_keys, open_shard, positions_of, values_of, weights_of
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import MANIFEST
from lightning_knnmt.storage.snapshot import open_together

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel


SMALL = 1 << 28  # bytes that are read in a moment


@dataclass(frozen=True)
class StoredShard:
    """A shard of an open datastore.

    Attributes:
        file: Its file.
        first: Number of its first entry in the datastore.
        starts: First entry of each pair within the shard, and the number of its entries, shape (pairs + 1,).
        kept: Whether each pair is still there, shape (pairs,).
    """

    file: h5py.File
    first: int
    starts: NDArray[np.int64]
    kept: NDArray[np.bool_]

    def pairs(self) -> Iterator[Pair]:
        """The pairs that are still there."""
        texts = (self.file[name].asstr()[:][self.kept] for name in ("src", "tgt", "document"))
        yield from map(Pair, *texts)

    @property
    def positions(self) -> NDArray[np.int64]:
        """Place of each entry's token in its target, shape (N,)."""
        return positions_of(self.file, self.starts)


class Datastore:
    """Keys, values and sentences of a parallel corpus, in HDF5 shards; reading never changes a file.

    Entries are numbered from 0 over all shards, in the order of the shards. What is appended follows, and what is
    removed keeps its numbers, keys and values: indexes skip it. Only `compact` gives entries other numbers.

    What is open stays what it was, whatever others do to the datastore: all shards are opened at once, and a file that
    was removed since can still be read where it is open (Windows does not remove it).

    Args:
        folder: Folder that `build_index.py` wrote.
        manifest: File name of the manifest; another than the usual one is that of a change which is under way.
        checksums: Compare every byte of shards and indexes with its checksum when they are opened; None: for those of
            256 MB or less.

    Attributes:
        manifest: What it was made with, and its shards.
        fingerprint: SHA-256 of the manifest, which holds the checksums of all shards, but for what was removed.
        removed: Entries that no index may find any more.

    Raises:
        DatastoreError: There is no whole datastore, or a shard is missing or damaged. Not every byte of a large one is
            looked at; `building.verify` does that.
    """

    def __init__(self, folder: Path | str, manifest: str = MANIFEST, checksums: bool | None = None) -> None:
        self.folder, self.checksums = Path(folder), checksums
        open_together(self.folder, lambda: self._open(manifest), manifest)
        self._starts = np.cumsum([0, *(shard.entries for shard in self.manifest.shards)])

    def _open(self, manifest: str) -> None:
        self.manifest, self.fingerprint = read_manifest(self.folder, manifest)
        self.removed = Removed.load(self.folder, self.manifest.removed, self.manifest.entries)
        self._files: list[h5py.File] = []
        try:
            for shard in self.manifest.shards:
                checksum, dtype = self.hashes(shard.file), self.manifest.provenance.key_dtype
                self._files.append(open_shard(self.folder, shard, self.key_size, checksum, dtype))
            if read_manifest(self.folder, manifest)[0] != self.manifest:  # whose shards may have the same names
                raise DatastoreError(f"{self.folder} was changed while it was opened; open it again")
        except BaseException:
            self.close()
            raise

    def hashes(self, *files: str) -> bool:
        """Whether some files are compared with their checksums when they are opened."""
        if self.checksums is None:
            return sum((self.folder / file).stat().st_size for file in files if (self.folder / file).exists()) <= SMALL
        return self.checksums

    @property
    def key_size(self) -> int:
        """D."""
        return self.manifest.provenance.key_size

    def __len__(self) -> int:
        """Entries, those that were removed counted."""
        return self.manifest.entries

    @cached_property
    def values(self) -> NDArray[np.int32]:
        """Target-token id of every entry, shape (N,)."""
        return np.concatenate([np.empty(0, np.int32), *map(values_of, self._files)])

    @cached_property
    def weights(self) -> NDArray[np.int32] | None:
        """How many entries each stands for, shape (N,); None if each stands for itself alone."""
        found = [weights_of(file) for file in self._files]
        if all(weights is None for weights in found):
            return None
        sizes = (shard.entries for shard in self.manifest.shards)
        return np.concatenate([np.ones(n, np.int32) if w is None else w for n, w in zip(sizes, found, strict=True)])

    def key_chunks(self, chunk: int = 65536, entries: range | None = None) -> Iterator[NDArray[Any]]:
        """Keys in the order of the entries, in arrays of shape (up to `chunk`, D).

        Args:
            chunk: Most keys of an array.
            entries: Whose keys, entries that follow each other; None: all.
        """
        wanted = range(len(self)) if entries is None else entries
        for start, stop, file in zip(self._starts[:-1], self._starts[1:], self._files, strict=True):
            last = min(stop, wanted.stop)
            for first in range(max(start, wanted.start), last, chunk):
                yield file["keys"][first - start : min(first + chunk, last) - start]

    def mapped_keys(self) -> list[NDArray[Any]]:
        """The keys of each shard, shape (its entries, D), mapped into memory for longer than the datastore is open."""
        return [map_keys(file) for file in self._files]

    def sample_keys(self, size: int, seed: int = 1, block: int = 65536) -> NDArray[np.float32]:
        """A uniform sample of the keys without repetition, shape (min(size, N), D).

        The whole store is drawn from, since the entries of a shard are ordered by sentence length: k-means on a
        prefix would see only the shortest sentences.
        """
        total = len(self)
        rng = np.random.default_rng(seed)
        chosen = np.arange(total) if size >= total else np.sort(rng.choice(total, size, replace=False))
        sample = np.empty((len(chosen), self.key_size), np.float32)
        for start, stop, file in zip(self._starts[:-1], self._starts[1:], self._files, strict=True):
            for first in range(start, stop, block):
                low, high = np.searchsorted(chosen, (first, min(first + block, stop)))
                if low < high:
                    rows = file["keys"][first - start : first - start + block]
                    sample[low:high] = rows[chosen[low:high] - first]
        return sample

    def context(self, entry: int) -> StoredContext:
        """The sentence pair that an entry comes from, and its position.

        Raises:
            IndexError: There is no such entry.
        """
        if not len(self):
            raise IndexError(f"entry is {entry}, the datastore is empty")
        if not 0 <= entry < len(self):
            raise IndexError(f"entry is {entry}, expected 0 to {len(self) - 1}")
        shard = int(np.searchsorted(self._starts, entry, side="right")) - 1
        file, starts = self._files[shard], self.shards[shard].starts
        local = entry - int(self._starts[shard])
        row = int(np.searchsorted(starts, local, side="right")) - 1
        src, tgt, document = (file[name].asstr()[row] for name in ("src", "tgt", "document"))
        position = int(file["positions"][local]) if "positions" in file else local - int(starts[row])
        return StoredContext(Pair(src, tgt, document), int(file["numbers"][row]), position)

    @cached_property
    def shards(self) -> list[StoredShard]:
        """The shards, with the places of their pairs."""
        shards = []
        for file, first in zip(self._files, self._starts.tolist(), strict=False):
            starts = np.cumsum(np.concatenate([[0], file["lengths"][:]]))
            shards.append(StoredShard(file, first, starts, ~self.removed.covers(first + starts[:-1])))
        return shards

    def sources(self) -> Iterator[str]:
        """The source text of every stored pair that was not removed."""
        for shard in self.shards:
            yield from shard.file["src"].asstr()[:][shard.kept]

    def check(self, model: "KeyedModel") -> None:
        """Refuse a model whose states cannot be compared with the stored keys.

        Raises:
            DatastoreError: The store was built with another model, tokenizer, key type or language.
        """
        differences = self.manifest.provenance.differences(Provenance.of(model))
        if differences:
            raise DatastoreError(
                f"the datastore {self.folder} does not fit the model {model.name}: {'; '.join(differences)} "
                "(datastore against model). Search with what it was built with, or build another datastore."
            )
        self._check_values(model.vocabulary_size)

    def _check_values(self, vocabulary: int) -> None:
        for start, stop, file in zip(self._starts[:-1], self._starts[1:], self._files, strict=True):
            if (largest := int(self.values[start:stop].max(initial=0))) >= vocabulary:
                raise DatastoreError(
                    f"{file.filename} holds the value {largest}, expected tokens below {vocabulary}, the size of the "
                    "model's vocabulary; build the datastore again"
                )

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()

    def __enter__(self) -> "Datastore":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
