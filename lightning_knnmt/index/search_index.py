"""What a memory on disk needs of an index."""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.metric import Metric

Distances = NDArray[np.float32]
Ids = NDArray[np.int64]


class SearchIndex(Protocol):
    """An index over the entries of a datastore: FAISS's own, one that leaves out entries, or one of many processes."""

    @property
    def key_size(self) -> int:
        """D."""
        ...

    @property
    def metric(self) -> Metric:
        """By what entries are near."""
        ...

    @property
    def nlist(self) -> int | None:
        """Inverted lists; None without lists."""
        ...

    @property
    def device(self) -> str:
        """Where it is searched."""
        ...

    def __len__(self) -> int: ...

    def search(
        self, queries: NDArray[np.float32], k: int, nprobe: int = 8, ef_search: int | None = None
    ) -> tuple[Distances, Ids]:
        """Distances (see `knn.Neighbors`) and entry numbers, shapes (R, K), of queries of shape (R, D)."""
        ...
