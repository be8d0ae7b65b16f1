"""Nearest-neighbor search in a built index; only this package imports FAISS."""

from pathlib import Path

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore.files import durable_file, file_sha256

Distances = NDArray[np.float32]
Ids = NDArray[np.int64]

# FAISS 1.15 compares all queries with all keys or centroids at once, as a product of matrices, from 128,000 numbers
# (R × D) on: for the R of a decoding step that is 2 to 8 times too slow. Older versions have a threshold of 20 queries.
faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, 4096)


class FaissIndex:
    """A FAISS index over the entries of a datastore.

    Distances are squared L2, smaller is nearer. Ids are entry numbers.

    Args:
        index: The FAISS index.
    """

    def __init__(self, index: faiss.Index) -> None:
        if index.metric_type != faiss.METRIC_L2:
            raise ValueError(f"the index has FAISS metric {index.metric_type}, expected METRIC_L2 (1); build it anew")
        self.index = index
        self._ivf = find_ivf(index)

    @classmethod
    def load(cls, path: Path) -> "FaissIndex":
        """Read an index file.

        Raises:
            FileNotFoundError: It does not exist.
            ValueError: FAISS cannot read it.
        """
        if not path.exists():
            raise FileNotFoundError(f"{path} does not exist; build it with build_index.py")
        try:
            return cls(faiss.read_index(str(path)))
        except RuntimeError as error:
            raise ValueError(f"{path} is not an index that FAISS can read ({error}); build it again") from error

    def save(self, path: Path) -> str:
        """Write the index, whole or not at all, and return the file's checksum.

        Raises:
            DatastoreError: It could not be written.
        """
        return write_index(self.index, path)

    def __len__(self) -> int:
        return int(self.index.ntotal)

    @property
    def key_size(self) -> int:
        """D."""
        return int(self.index.d)

    @property
    def nlist(self) -> int | None:
        """Number of inverted lists; None if the index has none."""
        return None if self._ivf is None else int(self._ivf.nlist)

    def set_nprobe(self, nprobe: int) -> None:
        """Choose how many lists a query scans; an index without lists has nothing to choose."""
        if nprobe < 1:
            raise ValueError(f"nprobe is {nprobe}, expected 1 or more")
        if self._ivf is not None:
            self._ivf.nprobe = min(nprobe, int(self._ivf.nlist))

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[Distances, Ids]:
        """The k nearest entries of each query.

        Args:
            queries: Shape (R, D), float32.
            k: K, 1 or more.

        Returns:
            Squared L2 distances and entry numbers, shapes (R, K); where fewer than K entries were found the rest is
            +inf and −1.
        """
        distances, ids = self.index.search(np.ascontiguousarray(queries, np.float32), k)
        distances[ids < 0] = np.inf
        return distances, ids

    @property
    def _lists(self) -> "faiss.InvertedLists | None":
        return None if self._ivf is None else self._ivf.invlists

    def list_sizes(self) -> NDArray[np.int64] | None:
        """Entries of each inverted list, shape (nlist,)."""
        lists = self._lists
        if lists is None:
            return None
        return np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)

    def list_of_entries(self) -> NDArray[np.int64] | None:
        """The inverted list of each entry, shape (N,)."""  # [entry -> list]
        lists, sizes = self._lists, self.list_sizes()
        if lists is None or sizes is None:
            return None
        assigned = np.empty(len(self), np.int64)
        for number, size in enumerate(sizes):
            if size:
                ids = faiss.rev_swig_ptr(lists.get_ids(number), int(size))
                assigned[ids] = number
        return assigned


def write_index(index: faiss.Index, path: Path) -> str:
    """Write a FAISS index, whole or not at all, and return the file's SHA-256.

    Raises:
        DatastoreError: It could not be written.
    """
    with durable_file(path) as file:

        def write(data: bytes) -> None:  # FAISS by itself does not notice if its last piece is missing (FAISS 1.15)
            file.write(data)
            file.check()

        faiss.write_index(index, faiss.PyCallbackIOWriter(write))  # type: ignore[attr-defined]
    return file_sha256(path)


def find_ivf(index: faiss.Index) -> "faiss.IndexIVF | None":
    """The inverted-file part of an index, under transforms and refinements; None if there is none."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVF):
        return index
    if isinstance(index, faiss.IndexPreTransform):
        return find_ivf(index.index)
    if isinstance(index, faiss.IndexRefine):
        return find_ivf(index.base_index)
    return None
