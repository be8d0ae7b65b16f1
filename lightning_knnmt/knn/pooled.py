"""Several memories of one model, searched as one."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_knnmt.data.pairs import StoredContext
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.metric import Metric

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel


class PooledMemory:
    """The K nearest entries are those of all memories together; entries of the second follow those of the first.

    >>> from lightning_knnmt.data.pairs import Pair
    >>> from lightning_knnmt.knn.memory import RamMemory
    >>> one, two = (RamMemory(torch.tensor([[x]]), torch.tensor([7]), [Pair("a", "b")], [1]) for x in (0.0, 3.0))
    >>> pooled = PooledMemory({"one": one, "two": two})
    >>> pooled.search(torch.tensor([[2.0]]), k=2).ids
    tensor([[1, 0]])
    >>> pooled.context(1).store
    'two'

    Args:
        memories: By the names that explanations call them.

    Raises:
        ValueError: There are none, or they are searched by different metrics or have keys of different sizes.
    """

    def __init__(self, memories: Mapping[str, Memory]) -> None:
        if not memories:
            raise ValueError("there are no memories to pool, expected one or more")
        self.memories = dict(memories)
        for name in ("metric", "key_size"):
            values = {store: getattr(memory, name) for store, memory in self.memories.items()}
            if len(set(values.values())) > 1:
                told = ", ".join(f"{value} of {store}" for store, value in values.items())
                raise ValueError(f"{name} is {told}, expected the same of all memories that are pooled")
        self._ends = list(accumulate((len(memory) for memory in self.memories.values()), initial=0))

    @property
    def _first(self) -> Memory:
        return next(iter(self.memories.values()))

    @property
    def key_size(self) -> int:
        """D."""
        return self._first.key_size

    @property
    def metric(self) -> Metric:
        """By what entries are near."""
        return self._first.metric

    @property
    def nlist(self) -> int | None:
        """Inverted lists of the memory that has most; None without lists."""
        return max((memory.nlist for memory in self.memories.values() if memory.nlist), default=None)

    def __len__(self) -> int:
        return self._ends[-1]

    def check(self, model: "KeyedModel") -> None:
        """Refuse a model whose states cannot be compared with the stored keys of every memory.

        Raises:
            ValueError: One was built with another model, tokenizer, key type or language.
        """
        for memory in self.memories.values():
            memory.check(model)

    def search(
        self, queries: Tensor, k: int, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None
    ) -> Neighbors:
        """The k nearest of all entries; of equally near ones, those of the memory that is named first."""
        found = []
        for start, memory in zip(self._ends, self.memories.values(), strict=False):
            lists = nprobe if memory.nlist is None else min(nprobe, memory.nlist)
            each = memory.search(queries, k, lists, rescore, ef_search)
            found.append(replace(each, ids=torch.where(each.ids < 0, each.ids, each.ids + start)))
        weights = None
        if any(each.weights is not None for each in found):
            weights = torch.cat([torch.ones_like(e.ids) if e.weights is None else e.weights for e in found], 1)
        distances, values, ids = (torch.cat(parts, 1) for parts in zip(*(each.parts for each in found), strict=True))
        order = distances.argsort(dim=1, stable=True)[:, :k]
        return Neighbors(distances, values, ids, weights).gather(order)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of those of all memories, in their order."""
        told = "".join(memory.fingerprint for memory in self.memories.values())
        return self._first.fingerprint if len(self.memories) == 1 else hashlib.sha256(told.encode()).hexdigest()

    def keys_of(self, ids: Tensor) -> Tensor:
        """Keys of some entries of shape (…), shape (…, D), float32, on the ids' device; 0 where there is none."""
        return self._of_each(ids, ids.new_zeros(*ids.shape, self.key_size, dtype=torch.float32), _keys_of)

    def values_of(self, ids: Tensor) -> Tensor:
        """Target-token ids of some entries of shape (…), on their device; 0 where there is none."""
        return self._of_each(ids, torch.zeros_like(ids), _values_of)

    def _of_each(self, ids: Tensor, found: Tensor, ask: Callable[[Memory, Tensor], Tensor]) -> Tensor:
        for (start, end), memory in zip(pairwise(self._ends), self.memories.values(), strict=True):
            own = (ids >= start) & (ids < end)
            found[own] = ask(memory, ids[own] - start)
        return found

    def store_of(self, ids: Tensor) -> Tensor:
        """Number of the memory of each entry, from 0, on the ids' device; −1 where there is no entry."""
        ends = torch.tensor(self._ends[1:], device=ids.device)
        return torch.where(ids < 0, -1, torch.searchsorted(ends, ids, right=True))

    def context(self, entry: int) -> StoredContext:
        """The sentence pair that an entry comes from, its position, and the name of its memory.

        Raises:
            IndexError: There is no such entry.
        """
        if not 0 <= entry < len(self):
            raise IndexError(f"entry is {entry}, expected 0 to {len(self) - 1}")
        number = int(self.store_of(torch.tensor(entry)))
        name = list(self.memories)[number]
        return replace(self.memories[name].context(entry - self._ends[number]), store=name)

    def sources(self) -> Iterator[str]:
        """The source text of every stored pair."""
        for memory in self.memories.values():
            yield from memory.sources()


def _keys_of(memory: Memory, ids: Tensor) -> Tensor:
    return memory.keys_of(ids)


def _values_of(memory: Memory, ids: Tensor) -> Tensor:
    return memory.values_of(ids)
