"""The keys of a datastore, read at any place."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.shard import KEY_DTYPE, open_shard
from lightning_knnmt.datastore.store import Datastore


class MappedKeys:
    """Stored keys by entry number, straight from the shards' files, which the operating system keeps in memory or not.

    Args:
        datastore: Whose keys to read. It need not stay open.

    Raises:
        DatastoreError: A shard is missing or damaged.
    """

    def __init__(self, datastore: Datastore) -> None:
        self.key_size = datastore.key_size
        shards = datastore.manifest.shards
        self._starts = np.cumsum([0, *(shard.entries for shard in shards)])
        self._shards: list[NDArray[np.float16]] = []
        for shard in shards:
            with open_shard(datastore.folder, shard, self.key_size) as file:
                offset, shape = file["keys"].id.get_offset(), file["keys"].shape
            path = datastore.folder / shard.file
            empty = np.empty(shape, KEY_DTYPE)  # nothing can be mapped
            self._shards.append(np.memmap(path, KEY_DTYPE, "r", offset, shape) if shard.entries else empty)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, entries: NDArray[np.int64]) -> NDArray[np.float16]:
        """The keys of some entries, shape (N, D).

        Args:
            entries: Their numbers in ascending order, shape (N,).
        """
        keys = np.empty((len(entries), self.key_size), KEY_DTYPE)
        bounds = np.searchsorted(entries, self._starts)  # [shard -> its first row]
        for low, high, start, shard in zip(bounds[:-1], bounds[1:], self._starts, self._shards, strict=False):
            if low < high:
                np.take(shard, entries[low:high] - start, axis=0, out=keys[low:high])
        return keys

    def chunks(self, entries: range, chunk: int) -> Iterator[NDArray[np.float16]]:
        """The keys of entries that follow each other, in arrays of shape (up to `chunk`, D).

        Args:
            entries: Their numbers.
            chunk: Most keys of an array.
        """
        for start, shard in zip(self._starts, self._shards, strict=False):
            for first in range(max(entries.start, start), min(entries.stop, start + len(shard)), chunk):
                rows = min(chunk, entries.stop - first, start + len(shard) - first)
                offset = shard.offset + shard[0].nbytes * int(first - start)  # type: ignore[attr-defined]
                content = np.fromfile(shard.filename, KEY_DTYPE, rows * self.key_size, offset=offset)  # type: ignore[attr-defined]
                yield content.reshape(rows, self.key_size)
