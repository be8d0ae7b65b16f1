"""Search among the tokens of similar sentences only (subset kNN-MT, arXiv 2305.16021)."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.checks import check_at_least, check_at_most
from lightning_knnmt.knn.exact import Entries, distances_to, nearest_entries, rows_by_sentence
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.knn.product_codes import CodedEntries, ProductCodes
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import MOST_NEIGHBORS
from lightning_knnmt.knn.step import Step
from lightning_knnmt.metric import Metric, seen_by
from lightning_knnmt.sentences.search import SentenceSearch

if TYPE_CHECKING:
    from lightning_knnmt.backbone.batch import Batch
    from lightning_knnmt.backbone.keyed_model import KeyedModel


@runtime_checkable
class SentenceMemory(Protocol):
    """A memory whose sentences can be searched, and whose entries can be told by sentence."""

    def open_sentences(self, name: str, model: "KeyedModel") -> SentenceSearch:
        """What finds sentences that are like a text."""
        ...

    def entries_of(self, sentences: NDArray[np.int64]) -> Tensor:
        """Entry numbers of some sentences, in their order, without those that were removed, shape (n,)."""
        ...

    def weights_of(self, ids: Tensor) -> Tensor | None:
        """How many entries some entries stand for, in the shape of their numbers; None: one each."""
        ...

    def product_codes(self) -> ProductCodes | None:
        """Codes of all entries; None where keys are not coded so."""
        ...


class Subset(Retriever):
    """The K nearest among the tokens of the n stored sentences that are most like the sentence.

    "Subset Retrieval Nearest Neighbor Machine Translation" (Deguchi et al., ACL 2023): sentences are searched once, and
    each step compares its query with their tokens only, by tables of the index's own product-quantization codes. The
    cost of a step depends on n and not on the size of the store.

    Args:
        k: K, neighbors of each row.
        sentences: n, stored sentences of each sentence; the paper's is 512.
        sentence_index: Name of the datastore's sentence index, which `build_index.py sentences` makes; a memory in RAM
            has none, and goes by BM25.
        rescore: Candidates of each row, found by codes, of which the stored keys decide the K nearest and their exact
            distances; 0: the codes decide.
        exact: Compare stored keys, not codes; so it is in any case where the index has no such codes.

    Raises:
        ValueError: A number is too small or too large, or `rescore` is less than k.
    """

    def __init__(
        self,
        k: int = 16,
        sentences: int = 512,
        sentence_index: str = "sentences",
        rescore: int = 0,
        exact: bool = False,
    ) -> None:
        check_at_least(1, k=k, sentences=sentences)
        check_at_most(MOST_NEIGHBORS, k=k, rescore=rescore)
        if rescore != 0 and rescore < k:
            raise ValueError(f"rescore is {rescore}, expected 0, or k = {k} candidates or more")
        self.k, self.sentences, self.sentence_index, self.rescore = k, sentences, sentence_index, rescore
        self.exact = exact
        self._codes: ProductCodes | None = None
        self._ids: list[Tensor] = []  # [sentence -> its entries]
        self._values: list[Tensor] = []
        self._coded: list[CodedEntries] = []
        self._entries: list[Entries] = []

    def bind(self, model: "KeyedModel", memory: Memory) -> None:
        """Search in this memory from now on.

        Raises:
            ValueError: It does not know its sentences.
            DatastoreError: The sentence index is missing, stale or damaged.
        """
        if not isinstance(memory, SentenceMemory):
            raise ValueError(f"{type(memory).__name__} has no stored sentences with keys, expected a datastore")
        self._memory: Memory = memory
        self._sentences: SentenceMemory = memory
        self._search = memory.open_sentences(self.sentence_index, model)
        codes = None if self.exact else memory.product_codes()
        self._codes = None if codes is None else codes.to(model.device)
        self._device = model.device

    def begin(self, batch: "Batch") -> None:
        """Find the stored sentences that are like each of B sentences, and lay out their tokens."""
        found = self._search.search(batch.source_texts, self.sentences)
        self._ids, self._values, self._coded, self._entries = [], [], [], []
        for numbers in found:
            ids = self._sentences.entries_of(numbers)
            values = self._memory.values_of(ids).to(self._device)
            if self._codes is None:
                keys = seen_by(self._memory.keys_of(ids), self._memory.metric).to(self._device)
                self._entries.append(Entries(keys, values, ids.to(self._device)))
            else:
                self._coded.append(self._codes.take(ids, self._device))
            self._ids.append(ids.to(self._device))
            self._values.append(values)

    def __call__(self, step: Step) -> Neighbors:
        """The K nearest of R rows, on the rows' device."""
        metric = self._memory.metric
        queries = seen_by(step.queries.detach().float(), metric)
        if self._codes is None:
            found = nearest_entries(queries, step.sentence, self._entries, self.k, metric)
        else:
            found = self._by_codes(self._codes, queries, step.sentence, self.rescore or self.k, metric)
            found = self._rescored(found, queries, metric) if self.rescore else found
        weights = self._sentences.weights_of(found.ids)
        return found if weights is None else Neighbors(*found.parts, weights)

    def _rescored(self, found: Neighbors, queries: Tensor, metric: Metric) -> Neighbors:
        """The K nearest by stored keys, and their exact distances."""
        exact = distances_to(queries, self._memory.keys_of(found.ids), metric)  # [R, K']
        distances, order = exact.masked_fill(found.ids < 0, torch.inf).sort(dim=1, stable=True)
        values, ids = (part.gather(1, order) for part in (found.values, found.ids))
        return Neighbors(distances, values, ids).first(self.k)

    def _by_codes(self, codes: ProductCodes, queries: Tensor, sentence: Tensor, k: int, metric: Metric) -> Neighbors:
        found = no_neighbors(len(queries), k, queries.device)
        queries = codes.transformed(queries)
        for number, rows in rows_by_sentence(sentence):
            coded = self._coded[number]
            if nearest := min(k, len(coded)):
                own = queries[rows]
                distances, places = coded.distances(own, codes.tables(own), metric).topk(nearest, largest=False)
                found.distances[rows, :nearest] = distances
                found.values[rows, :nearest] = self._values[number][places]
                found.ids[rows, :nearest] = self._ids[number][places]
        return found
