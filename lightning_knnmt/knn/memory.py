"""What neighbors are searched in: the interface, and a memory that lives in RAM."""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.backbone.provenance import Provenance
from lightning_knnmt.checks import check_at_least, check_one_of
from lightning_knnmt.data.pairs import Pair, StoredContext
from lightning_knnmt.knn.exact import nearest_keys
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.metric import Metric, seen_by
from lightning_knnmt.sentences.search import SentenceSearch
from lightning_knnmt.sentences.sparse import bm25

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel


class Memory(Protocol):
    """Keys and values of N stored contexts that can be searched; on disk (`lightning_knnmt.memory`) or in RAM."""

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
        """Inverted lists that a query can choose from; None without lists."""
        ...

    def __len__(self) -> int: ...

    def check(self, model: "KeyedModel") -> None:
        """Refuse a model whose states cannot be compared with the stored keys.

        Raises:
            ValueError: It was built with another model, tokenizer, key type or language.
        """
        ...

    def search(
        self, queries: Tensor, k: int, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None
    ) -> Neighbors:
        """The k nearest entries of queries of shape (R, D), on the queries' device.

        Args:
            queries: Shape (R, D).
            k: K, 1 or more.
            nprobe: Inverted lists that each query scans, where there are lists.
            rescore: Candidates whose distances the stored keys decide exactly, k or more; 0: the index decides.
            ef_search: Nodes that a search through an HNSW graph keeps in view; None: as the index was built.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """What tells these keys and values from others, in hexadecimal digits."""
        ...

    def keys_of(self, ids: Tensor) -> Tensor:
        """Keys of some entries, float32, on the ids' device; 0 where there is none.

        Args:
            ids: Entry numbers of any shape (…), −1 where there is none.

        Returns:
            Shape (…, D).
        """
        ...

    def values_of(self, ids: Tensor) -> Tensor:
        """Target-token ids of some entries, int64; shapes and −1 as in `keys_of`."""
        ...

    def context(self, entry: int) -> StoredContext:
        """The sentence pair that an entry comes from, and its position."""
        ...

    def sources(self) -> Iterator[str]:
        """The source text of every stored pair."""
        ...


def consecutive(starts: Tensor, stops: Tensor) -> Tensor:
    """The numbers of some ranges, one range after the other.

    >>> consecutive(torch.tensor([7, 3]), torch.tensor([9, 4]))
    tensor([7, 8, 3])
    """
    lengths = stops - starts
    shifts = starts - (lengths.cumsum(0) - lengths)
    return torch.arange(int(lengths.sum())) + shifts.repeat_interleave(lengths)


class RamMemory:
    """Keys in RAM, searched exactly by torch on the keys' device: for small memories, made in a moment.

    >>> memory = RamMemory(torch.eye(2), torch.tensor([7, 8]), [Pair("a b", "c d")], [2])
    >>> memory.search(torch.tensor([[0.0, 0.5]]), k=1).values
    tensor([[8]])
    >>> memory.context(1).position
    1

    Args:
        keys: Shape (N, D).
        values: Target-token ids, shape (N,).
        pairs: The sentence pairs, in the order of their entries.
        lengths: Entries of each pair; they add up to N.
        provenance: What the keys were made with, as `Provenance.of` says.
        block: Distances that are held at a time.
        metric: By what entries are near.
    """

    nlist = None

    def __init__(
        self, keys: Tensor, values: Tensor, pairs: list[Pair], lengths: list[int], provenance: Provenance | None = None,
        block: int = 1 << 26, metric: Metric = "l2",
    ) -> None:  # fmt: skip
        check_one_of(get_args(Metric), metric=metric)
        if not len(keys) == len(values) == sum(lengths):
            raise ValueError(
                f"there are {len(keys)} keys, {len(values)} values and {sum(lengths)} entries of pairs, expected as "
                "many of each"
            )
        self.keys, self.values, self.pairs, self.provenance, self.block = keys, values, pairs, provenance, block
        self._starts = torch.tensor([0, *lengths]).cumsum(0)  # [pair -> first entry]
        self.metric: Metric = metric
        self._norms = keys.float().square().sum(1) if metric == "l2" else None
        self._sentences: SentenceSearch | None = None

    @property
    def key_size(self) -> int:
        """D."""
        return self.keys.shape[1]

    def __len__(self) -> int:
        return len(self.keys)

    def check(self, model: "KeyedModel") -> None:
        """Refuse a model whose states cannot be compared with the stored keys.

        Raises:
            ValueError: It was built with another model, tokenizer, key type or language.
        """
        if self.provenance is not None and (differences := self.provenance.differences(Provenance.of(model))):
            raise ValueError(
                f"the memory does not fit the model {model.name}: {'; '.join(differences)} (memory against model)"
            )

    def search(
        self, queries: Tensor, k: int, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None
    ) -> Neighbors:
        """The k nearest entries of queries of shape (R, D): always exact, so that other options change nothing.

        Raises:
            ValueError: The queries have another D, or k is too small.
        """
        check_at_least(1, k=k)
        device, queries = queries.device, queries.detach().to(self.keys.device).float()
        if queries.ndim != 2 or queries.shape[1] != self.key_size:
            raise ValueError(f"queries have shape {tuple(queries.shape)}, expected (R, {self.key_size}) as the keys")
        nearest = min(k, len(self))
        distances = queries.new_full((len(queries), k), torch.inf)
        ids = torch.full((len(queries), k), -1, dtype=torch.long, device=queries.device)
        values = torch.zeros_like(ids)
        if nearest and len(queries):
            keys, queries = seen_by(self.keys.float(), self.metric), seen_by(queries, self.metric)
            for rows in torch.arange(len(queries), device=queries.device).split(max(1, self.block // len(self))):
                found = nearest_keys(queries[rows], keys, self._norms, nearest)
                distances[rows, :nearest], ids[rows, :nearest] = found
            values[:, :nearest] = self.values[ids[:, :nearest]].long()
        return Neighbors(distances, values, ids).to(device)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of keys and values."""
        digest = hashlib.sha256()
        for part in (self.keys.float(), self.values.long()):
            digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def keys_of(self, ids: Tensor) -> Tensor:
        """Keys of some entries of shape (…), shape (…, D), float32, on the ids' device; 0 where there is none."""
        keys = self.keys[ids.clamp(min=0).to(self.keys.device)].float().to(ids.device)
        return keys * (ids >= 0)[..., None]

    def values_of(self, ids: Tensor) -> Tensor:
        """Target-token ids of some entries of shape (…), on their device; 0 where there is none."""
        values = self.values[ids.clamp(min=0).to(self.values.device)].long().to(ids.device)
        return values * (ids >= 0)

    def open_sentences(self, name: str, model: "KeyedModel") -> SentenceSearch:
        """BM25 over the sources, whatever index is asked for: a memory in RAM has none beside it."""
        if self._sentences is None:
            self._sentences = bm25([pair.src for pair in self.pairs])
        return self._sentences

    def entries_of(self, sentences: NDArray[np.int64]) -> Tensor:
        """Entry numbers of some stored sentences, in their order, shape (n,)."""
        starts, stops = self._starts[torch.from_numpy(sentences)], self._starts[torch.from_numpy(sentences) + 1]
        return consecutive(starts, stops)

    def following(self, ids: Tensor) -> Tensor:
        """The entry of the next token of the same text, shape and device as of the entries; −1 where there is none."""
        last = torch.isin(ids + 1, self._starts.to(ids.device))
        return torch.where((ids < 0) | last, -1, ids + 1)

    def weights_of(self, ids: Tensor) -> None:
        """Every entry stands for itself."""

    def product_codes(self) -> None:
        """Keys are stored as they are."""

    def context(self, entry: int) -> StoredContext:
        """The sentence pair that an entry comes from, and its position.

        Raises:
            IndexError: There is no such entry.
        """
        if not 0 <= entry < len(self):
            raise IndexError(f"entry is {entry}, expected 0 to {len(self) - 1}")
        number = int(torch.searchsorted(self._starts, entry, right=True)) - 1
        return StoredContext(self.pairs[number], number, entry - int(self._starts[number]))

    def sources(self) -> Iterator[str]:
        """The source text of every stored pair."""
        yield from (pair.src for pair in self.pairs)
