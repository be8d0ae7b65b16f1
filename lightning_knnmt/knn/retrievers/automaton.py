"""Neighbors of the last token point to those of the next, which saves searches (RetoMaton, arXiv 2201.12431)."""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.knn.exact import distances_to
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.batch import Batch
    from lightning_knnmt.backbone.keyed_model import KeyedModel


@runtime_checkable
class LinkedMemory(Protocol):
    """A memory that knows which entry comes after another."""

    def following(self, ids: Tensor) -> Tensor:
        """The entry of the next token of the same text, for entries of any shape; −1 where there is none."""
        ...

    def weights_of(self, ids: Tensor) -> Tensor | None:
        """How many entries some entries stand for, in the shape of their numbers; None: one each."""
        ...


class Automaton(WholeStore):
    """Follows pointers where enough are left, and searches the whole store anew where they are not.

    "Neuro-Symbolic Language Modeling with Automaton-augmented Retrieval" (Alon et al., ICML 2022), without its
    clusters: of the neighbors of the token before, those whose value that token was point to the entries after them.
    Where there are `min_pointers` of these or more, they are the neighbors, with exact distances of their stored keys;
    their number can only fall, until a step searches. A row follows the row before it in its text, so there is one row
    a text (no beams).

    Args:
        k: K, neighbors of each row that searches.
        nprobe: Inverted lists that each row scans, where the index has lists.
        rescore: Candidates of which the stored keys decide the K nearest, as in `WholeStore`.
        ef_search: Nodes that a search through an HNSW graph keeps in view; None: as the index was built.
        min_pointers: Pointers that are enough not to search; more than k: every step searches.
    """

    follows = True

    def __init__(
        self, k: int = 16, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None, min_pointers: int = 1
    ) -> None:
        super().__init__(k, nprobe, rescore, ef_search)
        check_at_least(1, min_pointers=min_pointers)
        self.min_pointers = min_pointers
        self.followed = 0
        self._last = no_neighbors(0, k)  # of each text
        self._position = torch.empty(0, dtype=torch.long)  # [text -> position of the token whose neighbors these are]

    def bind(self, model: "KeyedModel", memory: Memory) -> None:
        """Search this memory from now on.

        Raises:
            ValueError: It does not know which entry comes after another.
        """
        super().bind(model, memory)
        if not isinstance(memory, LinkedMemory):
            raise ValueError(f"{type(memory).__name__} does not tell the entry after another, expected one datastore")
        self._links: LinkedMemory = memory

    def begin(self, batch: "Batch") -> None:
        """Forget the neighbors of other texts."""
        device = batch.input_ids.device
        self._last = no_neighbors(len(batch), self.k, device)
        self._position = torch.full((len(batch),), -1, device=device)

    def __call__(self, step: Step) -> Neighbors:
        """Neighbors of R rows; those of one text in the order of their positions.

        Raises:
            ValueError: The step does not say which tokens come before.
        """
        if step.previous is None or step.position is None:
            raise ValueError(
                "the step has no tokens before its rows, which Automaton follows; expected previous, position"
            )
        found = no_neighbors(len(step), self.k, step.queries.device)
        self.followed = 0
        for position in step.position.unique().tolist():
            rows = (step.position == position).nonzero().flatten()
            part = self._next(step.queries[rows], step.sentence[rows], step.previous[rows], position)
            for whole, own in zip(found.parts, part.parts, strict=True):
                whole[rows] = own
        weights = self._links.weights_of(found.ids)
        return found if weights is None else Neighbors(*found.parts, weights)

    def _next(self, queries: Tensor, text: Tensor, previous: Tensor, position: int) -> Neighbors:
        """Neighbors of one row of each of some texts, at the same position."""
        assert self._memory is not None, "bind comes first"
        last = self._last.rows(text)
        right = (last.values == previous[:, None]) & (self._position[text] == position - 1)[:, None]
        pointers = self._links.following(torch.where(right, last.ids, -1))  # [r, K]
        follow = (pointers >= 0).sum(1) >= self.min_pointers
        found = no_neighbors(len(queries), self.k, queries.device)
        if not follow.all():
            searched = self._memory.search(queries[~follow], self.k, self.nprobe, self.rescore, self.ef_search)
            for whole, own in zip(found.parts, searched.parts, strict=True):
                whole[~follow] = own
        if follow.any():
            for whole, own in zip(found.parts, self._at(queries[follow], pointers[follow]).parts, strict=True):
                whole[follow] = own
            self.followed += int(follow.sum())
        for whole, own in zip(self._last.parts, found.parts, strict=True):
            whole[text] = own
        self._position[text] = position
        return found

    def _at(self, queries: Tensor, pointers: Tensor) -> Neighbors:
        """The entries of pointers of shape (r, K) as neighbors, nearest first."""
        assert self._memory is not None, "bind comes first"
        most = int((pointers >= 0).sum(1).max())
        ids = pointers.sort(1, descending=True).values[:, :most]  # few of the K are left
        exact = distances_to(queries, self._memory.keys_of(ids), self._memory.metric)
        distances, order = exact.masked_fill(ids < 0, torch.inf).sort(dim=1, stable=True)
        found = no_neighbors(len(queries), self.k, queries.device)
        found.distances[:, :most], found.ids[:, :most] = distances, ids.gather(1, order)
        found.values[:, :most] = self._memory.values_of(found.ids[:, :most])
        return found
