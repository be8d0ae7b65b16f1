"""Search that leaves out entries which were removed from a datastore."""

import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.index.faiss_index import Distances, FaissIndex, Ids
from lightning_knnmt.index.gpu import MOST_ON_GPU

SPARE = 4  # neighbors asked for beyond K at once, for each that is removed on average


class FilteredIndex(FaissIndex):
    """An index that still holds removed entries, and never finds them.

    It searches for more neighbors where removed ones were among those found, until there are enough, or the index has
    no more. So the neighbors are those that a larger K would have given, for every family of indexes: FAISS 1.15 can
    itself leave out entries in some families only. Queries that need more than a GPU can select go to the CPU.

    Attributes:
        removed: What it leaves out.
    """

    removed: Removed
    _share: float

    @classmethod
    def load_without(
        cls, removed: Removed, total: int, path: Path, *others: Path, first: int, mmap: bool
    ) -> "FilteredIndex":
        """Read index files, as `FaissIndex.load`.

        Args:
            removed: What to leave out.
            total: Entries of the datastore.
            path: The file of the first part, or of all entries.
            others: Those of further parts, in order.
            first: Number of the first entry.
            mmap: Leave the entries on the disk, where FAISS can.
        """
        index = cls.load(path, *others, first=first, mmap=mmap)
        index.removed = removed
        index._share = len(removed) / total
        return index

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[Distances, Ids]:
        """As `FaissIndex.search`, among the entries that were not removed."""
        self.check(queries)
        self._check_limit("k", k)
        distances = np.full((len(queries), k), np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        rows, wanted = np.arange(len(queries)), k + math.ceil(SPARE * k * self._share)
        while True:
            parts = self._searched if wanted <= MOST_ON_GPU else self.parts
            found, entries = self._search(parts, queries[rows], wanted)
            more = entries[:, -1] >= 0  # whether the index may have others
            gone = (entries < 0) | self.removed.covers(entries)
            order = np.argsort(gone, axis=1, kind="stable")[:, :k]
            gone = np.take_along_axis(gone, order, 1)
            distances[rows] = np.where(gone, np.inf, np.take_along_axis(found, order, 1))
            ids[rows] = np.where(gone, -1, np.take_along_axis(entries, order, 1))
            rows = rows[more & gone.any(1)]
            if not len(rows) or wanted >= len(self):
                return distances, ids
            wanted *= 2
