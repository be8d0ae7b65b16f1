"""A datastore for every sentence, made of the pairs that are most like it (SK-MT, arXiv 2302.12188)."""

from typing import TYPE_CHECKING

import torch

from lightning_knnmt.checks import check_at_least, check_at_most
from lightning_knnmt.knn.exact import Entries, nearest_entries
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import MOST_NEIGHBORS
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.batch import Batch
    from lightning_knnmt.backbone.keyed_model import KeyedModel


class PerSentence(Retriever):
    """The K nearest among the tokens of the m pairs that are most like the sentence, teacher-forced for it alone.

    "Simple and Scalable Nearest Neighbor Machine Translation" (Dai et al., ICLR 2023): what is stored is a translation
    memory and no keys. A sentence costs one teacher-forced pass over m pairs, and a step a search among their tokens.

    Args:
        k: K, neighbors of each row; the paper's are 1 and 2.
        sentences: m, pairs of each sentence; the paper's are 2 and 16.
        candidates: Pairs that BM25 finds, of which the edit distance chooses.

    Raises:
        ValueError: There are fewer candidates than sentences, or a number is too small.
    """

    def __init__(self, k: int = 2, sentences: int = 16, candidates: int = 64) -> None:
        check_at_least(1, k=k, sentences=sentences)
        check_at_most(MOST_NEIGHBORS, k=k, candidates=candidates)
        if candidates < sentences:
            raise ValueError(f"candidates is {candidates}, expected sentences = {sentences} or more")
        self.k, self.sentences, self.candidates = k, sentences, candidates
        self._memory: PairMemory | None = None
        self._entries: list[Entries] = []  # [sentence -> its datastore]

    def bind(self, model: "KeyedModel", memory: Memory) -> None:
        """Take pairs from this memory from now on.

        Raises:
            ValueError: It is no memory of pairs.
        """
        if not isinstance(memory, PairMemory):
            raise ValueError(
                f"PerSentence takes pairs from a translation memory, expected a PairMemory (translation_memory: in a "
                f"configuration), not {type(memory).__name__}"
            )
        self._memory = memory

    def begin(self, batch: "Batch") -> None:
        """Make the datastores of B sentences."""
        assert self._memory is not None, "bind comes first"
        memory = self._memory
        similar = [memory.similar(text, self.sentences, self.candidates) for text in batch.source_texts]
        encoded = memory.encode(sorted({number for numbers in similar for number in numbers}))
        nothing = torch.empty(0, dtype=torch.long, device=memory.model.device)
        none = Entries(nothing.new_empty(0, memory.key_size, dtype=torch.float32), nothing, nothing)
        self._entries = [_joined([encoded[number] for number in numbers] or [none]) for numbers in similar]

    def __call__(self, step: Step) -> Neighbors:
        """The K nearest of R rows, on the rows' device."""
        return nearest_entries(step.queries, step.sentence, self._entries, self.k)


def _joined(entries: list[Entries]) -> Entries:
    parts = zip(*((each.keys, each.values, each.ids) for each in entries), strict=True)
    return Entries(*(torch.cat(part) for part in parts))
