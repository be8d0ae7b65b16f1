"""Search in the whole memory, whatever the sentence (arXiv 2010.00710)."""

from typing import TYPE_CHECKING

from lightning_knnmt.checks import check_at_least, check_at_most
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel


MOST_NEIGHBORS = 1 << 16  # of a row; with more, searching takes the memory of a store


class WholeStore(Retriever):
    """The K nearest of all entries.

    Args:
        k: K, neighbors of each row.
        nprobe: Inverted lists that each row scans, where the index has lists.
        rescore: Candidates that the index finds for each row, of which the stored keys decide the K nearest and their
            exact distances; 0: the index decides. With it, an index of short codes needs no copy of the keys (Refine).
        ef_search: Nodes that a search through an HNSW graph keeps in view; None: as the index was built.
    """

    def __init__(self, k: int = 16, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None) -> None:
        check_at_least(1, k=k, nprobe=nprobe, ef_search=ef_search)
        check_at_most(MOST_NEIGHBORS, k=k, rescore=rescore, ef_search=ef_search)
        if rescore != 0 and rescore < k:
            raise ValueError(f"rescore is {rescore}, expected 0, or k = {k} candidates or more")
        self.k, self.nprobe, self.rescore, self.ef_search = k, nprobe, rescore, ef_search
        self._memory: Memory | None = None

    def bind(self, model: "KeyedModel", memory: Memory) -> None:
        """Search this memory from now on."""
        self._memory = memory

    def __call__(self, step: Step) -> Neighbors:
        """The K nearest of R rows, on the rows' device."""
        assert self._memory is not None, "bind comes first"
        return self._memory.search(step.queries, self.k, self.nprobe, self.rescore, self.ef_search)
