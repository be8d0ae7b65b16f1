"""The keys of a datastore, read at any place."""

import mmap
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.shard import KEY_DTYPE
from lightning_knnmt.datastore.store import Datastore

WINDOW = 1 << 16  # bytes that Linux maps around one that is read
MOST_WINDOWS = 1 << 13  # that are mapped at a time


class MappedKeys:
    """Stored keys by entry number, straight from the shards' files, which the operating system keeps in memory or not.

    About 512 MB of them at most count as this process's memory at a time.

    Args:
        datastore: Whose keys to read. It need not stay open.
    """

    def __init__(self, datastore: Datastore) -> None:
        self.key_size = datastore.key_size
        self._shards = datastore.mapped_keys()
        self._starts = np.cumsum([0, *map(len, self._shards)])
        self._mapped = [np.zeros(shard.nbytes // WINDOW + 1, np.bool_) for shard in self._shards]  # [window -> mapped?]
        self._windows = 0  # that are mapped

    def __len__(self) -> int:
        return int(self._starts[-1])

    def rows(self, entries: NDArray[np.int64]) -> NDArray[np.float16]:
        """The keys of some entries, shape (N, D).

        Args:
            entries: Their numbers in ascending order, shape (N,).
        """
        keys = np.empty((len(entries), self.key_size), KEY_DTYPE)
        bounds = np.searchsorted(entries, self._starts)  # [shard -> its first row]
        for number, (low, high) in enumerate(pairwise(bounds)):
            for first in range(low, high, MOST_WINDOWS // 2):
                last = min(high, first + MOST_WINDOWS // 2)
                rows = entries[first:last] - self._starts[number]
                np.take(self._shards[number], rows, axis=0, out=keys[first:last])
                windows = np.unique(rows * keys.itemsize * self.key_size // WINDOW)
                self._windows += len(windows) - int(self._mapped[number][windows].sum())
                self._mapped[number][windows] = True
                if self._windows > MOST_WINDOWS // 2:
                    self._unmap()
        return keys

    def _unmap(self) -> None:
        """Let the pages go; they are mapped anew when they are read, mostly without reading the disk."""
        self._windows = 0
        for shard, mapped in zip(self._shards, self._mapped, strict=True):
            mapped[:] = False
            if len(shard) and hasattr(mmap, "MADV_DONTNEED"):
                shard._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
