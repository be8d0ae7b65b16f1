"""The keys of a datastore, read at any place."""

import mmap
from types import SimpleNamespace

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.shard import KEY_DTYPE
from lightning_knnmt.datastore.store import Datastore
from lightning_knnmt.storage.errors import DatastoreError

WINDOW_BYTES = 1 << 16  # that Linux maps around one that is read
MOST_WINDOWS = 1 << 13  # that are mapped at a time


class MappedKeys:
    """Stored keys by entry number, straight from the shards' files, which the operating system keeps in memory or not.

    About 512 MB of them at most count as this process's memory at a time.

    Args:
        datastore: Whose keys to read. It need not stay open.
    """

    def __init__(self, datastore: Datastore) -> None:
        import torch

        self.key_size = datastore.key_size
        if (dtype := datastore.manifest.provenance.key_dtype) != KEY_DTYPE.__name__:
            raise DatastoreError(f"{datastore.folder} holds keys of {dtype}, expected float16; search without rescore")
        self._shards = [shard for shard in datastore.mapped_keys() if len(shard)]
        self._ends = np.cumsum([len(shard) for shard in self._shards]).astype(np.uint64)  # [shard -> entry after it]
        if self._shards:  # one view over all of them, where a key begins at any number, so that one call gathers keys
            addresses = np.array([shard.ctypes.data for shard in self._shards])
            first, last = addresses.min(), max(a + s.nbytes for a, s in zip(addresses, self._shards, strict=True))
            view = {
                "data": (int(first), False), "shape": (int(last - first) // 2 - self.key_size + 1, self.key_size),
                "strides": (2, 2), "typestr": "<f2", "version": 3,
            }  # fmt: skip
            self._numbers = torch.from_numpy(np.asarray(SimpleNamespace(__array_interface__=view)))
            starts = np.concatenate([[0], self._ends[:-1]]).astype(np.int64)
            self._offsets = (addresses - first) // 2 - starts * self.key_size  # [shard -> its number in the view]
        bytes_in_all = sum(shard.nbytes for shard in self._shards)
        self._mapped = np.zeros(bytes_in_all // WINDOW_BYTES + 1, np.bool_)  # [window -> may it be mapped?]
        self._limited = len(self._mapped) > MOST_WINDOWS
        self._at_most = 0  # windows that are mapped

    def __len__(self) -> int:
        return int(self._ends[-1]) if self._shards else 0

    def rows(self, entries: NDArray[np.int64]) -> NDArray[np.float16]:
        """The keys of some entries, shape (N, D).

        Args:
            entries: Their numbers, shape (N,).

        Raises:
            IndexError: There is no such entry.
        """
        import torch

        if not len(entries):
            return np.empty((0, self.key_size), KEY_DTYPE)
        shards = self._ends.searchsorted(entries.view(np.uint64), "right")  # none for numbers below 0, either
        places = torch.from_numpy(entries * self.key_size + self._offsets[shards])
        if not self._limited:
            return self._numbers.index_select(0, places).numpy()
        step = MOST_WINDOWS // 4
        blocks = []
        for first in range(0, len(entries), step):
            blocks.append(self._numbers.index_select(0, places[first : first + step]))
            self._count(entries[first : first + step])
        return torch.cat(blocks).numpy()

    def _count(self, entries: NDArray[np.int64]) -> None:
        """Let the pages go if too many are mapped; they are mapped anew when they are read, mostly from memory."""
        self._mapped[entries * (2 * self.key_size) // WINDOW_BYTES] = True
        self._at_most += len(entries)
        if self._at_most <= MOST_WINDOWS // 2:
            return
        self._at_most = int(self._mapped.sum())
        if self._at_most > MOST_WINDOWS // 4:
            self._at_most, self._mapped[:] = 0, False
            for shard in self._shards:
                if hasattr(mmap, "MADV_DONTNEED"):
                    shard._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]
