"""The keys of a datastore, read at any place."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.shard import KEY_DTYPE
from lightning_knnmt.datastore.store import Datastore


class MappedKeys:
    """Stored keys by entry number, straight from the shards' files, which the operating system keeps in memory or not.

    Args:
        datastore: Whose keys to read. It need not stay open.
    """

    def __init__(self, datastore: Datastore) -> None:
        self.key_size = datastore.key_size
        self._paths = [datastore.folder / shard.file for shard in datastore.manifest.shards]
        self._shards = datastore.mapped_keys()
        self._starts = np.cumsum([0, *map(len, self._shards)])

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

        They are read from files that must still be there, as they are for whoever writes to the datastore.

        Args:
            entries: Their numbers.
            chunk: Most keys of an array.
        """
        for start, path, shard in zip(self._starts, self._paths, self._shards, strict=False):
            for first in range(max(entries.start, start), min(entries.stop, start + len(shard)), chunk):
                rows = min(chunk, entries.stop - first, start + len(shard) - first)
                offset = shard.offset + shard[0].nbytes * int(first - start)  # type: ignore[attr-defined]
                content = np.fromfile(path, KEY_DTYPE, rows * self.key_size, offset=offset)
                yield content.reshape(rows, self.key_size)
