"""Some entries of a datastore, copied into new shards; keys are not encoded again."""

from collections.abc import Iterator
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.building.encoder import blocks_of
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore.manifest import ShardInfo
from lightning_knnmt.datastore.shard import OF_ENTRIES, TEXTS, ShardWriter
from lightning_knnmt.datastore.store import Datastore, StoredShard
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256

COPIED_AT_ONCE = 65536  # entries

Row = tuple[int, int, int]  # shard, pair within it, the pair's entries that are copied


class Copying:
    """Which entries of a datastore are copied; pairs without any are not, and the others keep order and numbers.

    Args:
        store: The datastore.
        kept: Which entries are copied, shape (N,).
        weights: How many entries each then stands for, shape (N,); None: as before.
    """

    def __init__(self, store: Datastore, kept: NDArray[np.bool_], weights: NDArray[np.int32] | None = None) -> None:
        self.store, self.kept = store, kept
        self.weights = store.weights if weights is None else weights

    def groups(self) -> Iterator[list[Row]]:
        """The pairs of each shard to be written, in shards that are as full as they can be."""
        rows = (
            (number, int(pair), int(lengths[pair]))
            for number, shard in enumerate(self.store.shards)
            for lengths in [self._lengths(shard)]
            for pair in np.flatnonzero(lengths)
        )
        return blocks_of(rows, self.store.manifest.pairs_of_a_shard)

    def write(self, path: Path, rows: list[Row]) -> ShardInfo:
        """Write a shard of some pairs.

        Raises:
            DatastoreError: It could not be written.
        """
        entries = sum(row[2] for row in rows)
        blocks = [(number, [pair for _, pair, _ in of_shard]) for number, of_shard in groupby(rows, lambda row: row[0])]
        more, dtype = self._more(blocks), self.store.manifest.provenance.key_dtype
        with ShardWriter(path, entries, len(rows), self.store.key_size, more, dtype) as writer:
            for number, pairs in blocks:
                self._copy(self.store.shards[number], np.array(pairs), writer, more)
        return ShardInfo(path.name, entries, len(rows), file_sha256(path))

    def _lengths(self, shard: StoredShard) -> NDArray[np.int64]:
        """Entries of each pair that are copied."""
        kept = self.kept[shard.first : shard.first + shard.starts[-1]]
        return np.diff(np.concatenate([[0], np.cumsum(kept)])[shard.starts])

    def _more(self, blocks: list[tuple[int, list[int]]]) -> tuple[str, ...]:
        """What of `OF_ENTRIES` some pairs need: positions if one has lost entries, weights if one is not 1."""
        needed = set()
        for number, pairs in blocks:
            shard = self.store.shards[number]
            whole = np.diff(shard.starts)[pairs] == self._lengths(shard)[pairs]
            if "positions" in shard.file or not whole.all():
                needed.add("positions")
            span = slice(shard.first + shard.starts[pairs[0]], shard.first + shard.starts[pairs[-1] + 1])
            if self.weights is not None and (self.weights[span][self.kept[span]] != 1).any():
                needed.add("weights")
        return tuple(name for name in OF_ENTRIES if name in needed)

    def _copy(self, shard: StoredShard, pairs: NDArray[np.int64], writer: ShardWriter, more: tuple[str, ...]) -> None:
        """Append some pairs, in ascending order, a block at a time; those between them have no entries to copy."""
        blocks = shard.starts[pairs] // COPIED_AT_ONCE
        cuts = [0, *(np.flatnonzero(np.diff(blocks)) + 1).tolist(), len(pairs)]
        lengths = self._lengths(shard)
        for low, high in pairwise(cuts):
            chosen = pairs[low:high]
            span = slice(int(chosen[0]), int(chosen[-1]) + 1)
            entries = slice(int(shard.starts[span.start]), int(shard.starts[span.stop]))
            kept = self.kept[shard.first + entries.start : shard.first + entries.stop]
            texts = (shard.file[text].asstr()[span][chosen - span.start] for text in TEXTS)
            arrays = {name: self._array(name, shard, entries)[kept] for name in more}
            writer.append(
                shard.file["keys"][entries][kept], shard.file["values"][entries][kept], lengths[chosen].tolist(),
                [Pair(*each) for each in zip(*texts, strict=True)], shard.file["numbers"][span][chosen - span.start],
                **arrays,
            )  # fmt: skip

    def _array(self, name: str, shard: StoredShard, entries: slice) -> NDArray[np.int32]:
        if name == "positions":
            return shard.positions[entries].astype(np.int32)
        assert self.weights is not None  # or they would not be needed
        return self.weights[shard.first + entries.start : shard.first + entries.stop]


def check_whole(store: Datastore) -> None:
    """Refuse to copy damaged keys, which would get a checksum that fits.

    Raises:
        DatastoreError: A shard is not as it was written.
    """
    for shard in store.manifest.shards:
        if not shard.is_whole(store.folder):
            raise DatastoreError(f"{store.folder / shard.file} is damaged (its checksum is another); restore it first")
