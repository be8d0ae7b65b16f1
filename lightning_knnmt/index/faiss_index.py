"""Nearest-neighbor search in a built index; only this package imports FAISS."""

from pathlib import Path
from typing import Self

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.index.gpu import MOST_ON_GPU, Gpus
from lightning_knnmt.index.layers import (
    FAISS_METRICS,
    at_lists,
    find_graph,
    find_ivf,
    inverted_lists,
    returns_hamming,
    seen_by,
)
from lightning_knnmt.index.search_index import Distances, Ids
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.files import durable_file, file_sha256

__all__ = ["FaissIndex", "find_ivf", "nearest", "read_index", "write_index"]

# FAISS 1.15 compares all queries with all keys or centroids at once, as a product of matrices, from 128,000 numbers
# (R × D) on: for the R of a decoding step that is 2 to 8 times too slow. Older versions have a threshold of 20 queries.
faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, 4096)


class FaissIndex:
    """A FAISS index over the entries of a datastore, in one part or several that were trained as one.

    Distances are those of `knn.Neighbors`: smaller is nearer, and similarities enter as −d. Ids are entry numbers.

    Attributes:
        index: The first part, which is the whole index if there is only one.
        parts: All parts.
        first: Number of the first entry.

    Args:
        index: The FAISS index of the first part, or of all entries.
        others: Those of further parts, whose entries follow.
        first: Number of the first entry.
        metric: By what its entries are near.

    Raises:
        ValueError: FAISS's metric is another.
    """

    def __init__(self, index: faiss.Index, *others: faiss.Index, first: int = 0, metric: Metric = "l2") -> None:
        parts, number = (index, *others), FAISS_METRICS[metric]
        for part in parts:
            if part.metric_type != number:
                name = "METRIC_L2 (1)" if metric == "l2" else f"METRIC_INNER_PRODUCT (0) for {metric}"
                raise ValueError(f"the index has FAISS metric {part.metric_type}, expected {name}; build it anew")
            if returns_hamming(part):
                raise ValueError("the index counts bits that differ, expected squared L2 distances; build it anew")
        self.index, self.parts = index, parts
        self.metric: Metric = metric
        self._starts = first + np.cumsum([0, *(part.ntotal for part in parts)])  # [part -> first entry]
        self.first = first
        self._ivfs = [ivf for part in parts if (ivf := find_ivf(part)) is not None]
        self._gpus: Gpus | None = None
        self._searched = parts
        self._nprobe = 0  # of the last search
        self._graphs = [graph for part in parts if (graph := find_graph(part)) is not None]
        self._built_ef_search = [int(graph.hnsw.efSearch) for graph in self._graphs]
        self._ef_search: int | None = None  # of the last search; None: as built

    @classmethod
    def load(cls, path: Path, *others: Path, first: int = 0, mmap: bool = False, metric: Metric = "l2") -> Self:
        """Read index files.

        Args:
            path: The file of the first part, or of all entries.
            others: Those of further parts, in order.
            first: Number of the first entry.
            mmap: Leave the entries on the disk, where FAISS can.
            metric: By what its entries are near.

        Raises:
            FileNotFoundError: One does not exist.
            ValueError: FAISS cannot read it.
        """
        return cls(*(read_index(each, mmap) for each in (path, *others)), first=first, metric=metric)

    def save(self, path: Path) -> str:
        """Write the index of a single part, whole or not at all, and return the file's checksum.

        Raises:
            DatastoreError: It could not be written.
        """
        return write_index(self.index, path)

    def __len__(self) -> int:
        return int(self._starts[-1] - self._starts[0])

    @property
    def key_size(self) -> int:
        """D."""
        return int(self.index.d)

    @property
    def nlist(self) -> int | None:
        """Number of inverted lists; None if the index has none."""
        return int(self._ivfs[0].nlist) if self._ivfs else None

    @property
    def device(self) -> str:
        """Where it is searched."""
        return "cpu" if self._gpus is None else f"gpu {', '.join(map(str, self._gpus.numbers))}"

    def search_on(self, gpus: Gpus) -> None:
        """Search copies of the parts from now on, each divided between GPUs; the rest is still read from the parts.

        Raises:
            ValueError: FAISS has no GPU version of the index.
        """
        self._searched, self._gpus = tuple(gpus.copy(part) for part in self.parts), gpus
        self._nprobe = 0  # unknown

    def search(
        self, queries: NDArray[np.float32], k: int, nprobe: int = 8, ef_search: int | None = None
    ) -> tuple[Distances, Ids]:
        """The k nearest entries of each query.

        Args:
            queries: Shape (R, D), float32.
            k: K, 1 or more.
            nprobe: Inverted lists that a query scans, where the index has lists.
            ef_search: Nodes that a search through an HNSW graph, of entries or of centroids, keeps in view; None: as
                the index was built.

        Returns:
            Distances and entry numbers, shapes (R, K); where fewer than K entries were found the rest is
            +inf and −1.

        Raises:
            ValueError: The queries have another D, there is no graph, or K or nprobe is more than a GPU can select.
        """
        self.check_options(queries, k, nprobe, ef_search)
        return self.search_anywhere(queries, k, nprobe, ef_search)

    def check_options(self, queries: NDArray[np.float32], k: int, nprobe: int, ef_search: int | None) -> None:
        """Refuse what `search` refuses.

        Raises:
            ValueError: The queries have another D, or an option is too small or more than a GPU can select.
        """
        self.check(queries)
        check_at_least(1, k=k, nprobe=nprobe, ef_search=ef_search)
        if self._gpus is not None:
            for name, value in (("k", k), ("nprobe", min(nprobe, self.nlist or 1))):
                if value > MOST_ON_GPU:
                    raise ValueError(
                        f"{name} is {value}, expected {MOST_ON_GPU} or less on GPUs (for k, with candidates for "
                        "rescore); choose fewer, or search on the CPU"
                    )

    def search_anywhere(
        self, queries: NDArray[np.float32], k: int, nprobe: int, ef_search: int | None
    ) -> tuple[Distances, Ids]:
        """As `search`; more neighbors than a GPU can select are searched on the CPU."""
        parts = self._searched if k <= MOST_ON_GPU else self.parts
        self._choose(nprobe, ef_search)
        return self._search_in(parts, seen_by(np.ascontiguousarray(queries, np.float32), self.metric), k)

    def _search_in(
        self, parts: "tuple[faiss.Index, ...]", queries: NDArray[np.float32], k: int
    ) -> tuple[Distances, Ids]:
        found = []
        for part, start in zip(parts, self._starts[:-1], strict=True):
            distances, ids = part.search(queries, k)
            if self.metric != "l2":
                np.negative(distances, out=distances)
            distances[ids < 0] = np.inf
            ids[ids >= 0] += start
            found.append((distances, ids))
        return nearest(found, k)

    def _choose(self, nprobe: int, ef_search: int | None) -> None:
        """Tell FAISS what it keeps as a state of the index."""
        if self.nlist is not None and (nprobe := min(nprobe, self.nlist)) != self._nprobe:
            for ivf in self._ivfs:
                ivf.nprobe = nprobe
            if self._gpus is not None:
                for copy in self._searched:
                    self._gpus.set_nprobe(copy, nprobe)
            self._nprobe = nprobe
        if ef_search is not None and not self._graphs:
            raise ValueError(f"ef_search is {ef_search}, but the index has no HNSW graph; leave it out")
        if ef_search != self._ef_search:
            for graph, built in zip(self._graphs, self._built_ef_search, strict=True):
                graph.hnsw.efSearch = built if ef_search is None else ef_search
            self._ef_search = ef_search

    def list_sizes(self) -> NDArray[np.int64] | None:
        """Entries of each inverted list, shape (nlist,)."""
        if not self._ivfs:
            return None
        return np.sum([_list_sizes(inverted_lists(ivf)) for ivf in self._ivfs], axis=0)

    def list_of_entries(self) -> NDArray[np.int32] | None:
        """The inverted list of each entry, shape (N,)."""  # [entry -> list]
        if not self._ivfs:
            return None
        return np.concatenate([_list_of_entries(inverted_lists(ivf), ivf.ntotal) for ivf in self._ivfs])

    def probed_lists(self, queries: NDArray[np.float32], nprobe: int) -> NDArray[np.int64]:
        """The inverted lists that queries scan, nearest first, whatever transforms and refinements lie around them.

        Args:
            queries: Shape (R, D).
            nprobe: Lists of each query; more than there are means all.

        Returns:
            Shape (R, min(nprobe, nlist)); −1 where a quantizer such as HNSW found no more.

        Raises:
            ValueError: The index has no inverted lists, or the queries have another D.
        """
        self.check(queries)
        if not self._ivfs:
            raise ValueError("the index has no inverted lists, expected one whose factory string has IVF")
        ivf = self._ivfs[0]
        seen = at_lists(self.index, seen_by(np.ascontiguousarray(queries, np.float32), self.metric))
        return ivf.quantizer.search(seen, min(nprobe, int(ivf.nlist)))[1]

    def codes_scanned(self, queries: NDArray[np.float32], nprobe: int) -> NDArray[np.int64]:
        """How many entries each query is compared with, shape (R,).

        Args:
            queries: Shape (R, D).
            nprobe: Lists of each query.

        Raises:
            ValueError: The index has no inverted lists, or the queries have another D.
        """
        probed = self.probed_lists(queries, nprobe)
        sizes = self.list_sizes()
        return np.where(probed >= 0, sizes[probed], 0).sum(1)  # type: ignore[index]

    def check(self, queries: NDArray[np.float32]) -> None:
        """Refuse queries that are not of shape (R, D).

        Raises:
            ValueError: They are not.
        """
        if queries.ndim != 2 or queries.shape[1] != self.key_size:
            raise ValueError(f"queries have shape {queries.shape}, expected (R, {self.key_size}) as the index's keys")


def nearest(found: "list[tuple[Distances, Ids]]", k: int) -> tuple[Distances, Ids]:
    """The k nearest of what was found in several places, those of earlier places first if equally near.

    Args:
        found: Distances and entry numbers, shapes (R, K'), nearest first; +inf and −1 where nothing was found.
        k: K, no more than all K' together.

    Returns:
        Shapes (R, K).
    """
    if len(found) == 1:
        return found[0]
    distances, ids = (np.concatenate(arrays, axis=1) for arrays in zip(*found, strict=True))
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)


def read_index(path: Path, mmap: bool = False) -> faiss.Index:
    """Read a FAISS index.

    Args:
        path: The file.
        mmap: Leave the codes and entry numbers on the disk, and let the operating system keep what is searched often.
            FAISS 1.15 does so for all but FastScan codes (x4fs, RaBitQfs), which it reads whole; a Refine after them
            is mapped. The file may be moved, but not written to, while it is open.

    Raises:
        FileNotFoundError: It does not exist.
        ValueError: FAISS cannot read it.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; build it with build_index.py")
    if not path.is_file():
        raise ValueError(f"{path} is no plain file, expected an index; build it again")
    if hasattr(faiss, "set_deserialization_vector_byte_limit"):  # the file, and tables that FAISS computes
        size = (1 << 31) + path.stat().st_size
        faiss.set_deserialization_vector_byte_limit(size)
        faiss.set_deserialization_loop_limit(size)
    try:
        return faiss.read_index(str(path), faiss.IO_FLAG_MMAP_IFC if mmap else 0)
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"{path} is not an index that FAISS can read ({error}); build it again") from error


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


def _list_sizes(lists: "faiss.InvertedLists") -> NDArray[np.int64]:
    return np.array([lists.list_size(number) for number in range(lists.nlist)], np.int64)


def _list_of_entries(lists: "faiss.InvertedLists", entries: int) -> NDArray[np.int32]:
    assigned = np.empty(entries, np.int32)
    for number, size in enumerate(_list_sizes(lists)):
        if size:
            ids = faiss.rev_swig_ptr(lists.get_ids(number), int(size))
            assigned[ids] = number
    return assigned
