"""Search that leaves out entries which were removed from a datastore."""

import math

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.search_index import Distances, Ids
from lightning_knnmt.metric import Metric

EXTRA_PER_REMOVED = 4  # neighbors asked for beyond K at once, for each that is removed on average


class FilteredIndex:
    """An index that still holds removed entries, and never finds them.

    It searches for more neighbors where removed ones were among those found, until there are enough, or the index has
    no more. So the neighbors are those that a larger K would have given, for every family of indexes: FAISS 1.15 can
    itself leave out entries in some families only. Queries that need more than a GPU can select go to the CPU.

    Args:
        whole: The index with the removed entries.
        removed: What it leaves out.
        total: Entries of the datastore, of which the index may have a part.
    """

    def __init__(self, whole: FaissIndex, removed: Removed, total: int) -> None:
        self.whole, self.removed = whole, removed
        self._share = len(removed) / total

    @property
    def key_size(self) -> int:
        """D."""
        return self.whole.key_size

    @property
    def metric(self) -> Metric:
        """By what entries are near."""
        return self.whole.metric

    @property
    def nlist(self) -> int | None:
        """Inverted lists; None without lists."""
        return self.whole.nlist

    @property
    def device(self) -> str:
        """Where it is searched."""
        return self.whole.device

    @property
    def first(self) -> int:
        """Number of the first entry."""
        return self.whole.first

    def __len__(self) -> int:
        return len(self.whole)

    def search(
        self, queries: NDArray[np.float32], k: int, nprobe: int = 8, ef_search: int | None = None
    ) -> tuple[Distances, Ids]:
        """As `FaissIndex.search`, among the entries that were not removed."""
        self.whole.check_options(queries, k, nprobe, ef_search)
        distances = np.full((len(queries), k), np.inf, np.float32)
        ids = np.full((len(queries), k), -1, np.int64)
        rows, wanted = np.arange(len(queries)), k + math.ceil(EXTRA_PER_REMOVED * k * self._share)
        while True:
            found, entries = self.whole.search_anywhere(queries[rows], wanted, nprobe, ef_search)
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
