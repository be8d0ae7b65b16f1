"""Exhaustive search by torch, on the device where the model is: exact, or by product-quantization codes.

Queries and neighbors stay tensors on the device. Entries are compared in blocks, of which the K nearest are kept, so
that memory does not grow with N; nothing waits for the device but what selects the K nearest.
"""

from dataclasses import dataclass, replace
from typing import Self

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.index.codes import stored_codes
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.layers import innermost
from lightning_knnmt.index.search_index import Distances, Ids
from lightning_knnmt.metric import Metric

BLOCK = 1 << 24  # distances that are held at a time


@dataclass(frozen=True)
class _Exact:
    """Keys (N, D) and their squared norms (N,)."""

    keys: Tensor
    norms: Tensor

    def prepared(self, queries: Tensor) -> Tensor:
        return queries

    def nearness(self, queries: Tensor, entries: slice) -> Tensor:
        """Squared distances to a slice of n entries without the queries' own norms, shape (R, n)."""
        return self.norms[entries] - 2 * queries @ self.keys[entries].float().T

    def norms_of(self, queries: Tensor) -> Tensor:
        return queries.square().sum(1, keepdim=True)


@dataclass(frozen=True)
class _Coded:
    """Rows of the tables that each entry adds up (N, W), norms of the decoded keys, and what codes stand for."""

    places: Tensor
    norms: Tensor
    codebooks: Tensor
    lists: Tensor | None
    centroids: Tensor | None
    matrix: Tensor | None
    offset: Tensor | None

    def transformed(self, queries: Tensor) -> Tensor:
        queries = queries if self.matrix is None else queries @ self.matrix.T
        queries = queries if self.offset is None else queries + self.offset
        pieces, _, size = self.codebooks.shape
        return F.pad(queries, (0, pieces * size - queries.shape[1]))

    def prepared(self, queries: Tensor) -> Tensor:
        """What each byte of a code adds to a product, behind it each centroid's product, shape (W · 256 + nlist, R)."""
        seen = self.transformed(queries)
        pieces, codewords, size = self.codebooks.shape
        products = torch.bmm(self.codebooks, seen.T.reshape(pieces, size, -1))  # [M, L, R]
        if codewords == 16:
            products = (products[0::2, None] + products[1::2, :, None]).flatten(1, 2)  # [W, 256, R]
        tables = products.flatten(0, 1)
        if self.centroids is None:
            return tables
        return torch.cat([tables, self.centroids @ seen[:, : self.centroids.shape[1]].T])

    def nearness(self, tables: Tensor, entries: slice) -> Tensor:
        """As above, by asymmetric distances (arXiv 2305.16021), from what `prepared` has given."""
        products = F.embedding_bag(self.places[entries], tables, mode="sum")  # [n, R]
        return (self.norms[entries, None] - 2 * products).T

    def norms_of(self, queries: Tensor) -> Tensor:
        return self.transformed(queries).square().sum(1, keepdim=True)


class TorchIndex:
    """N entries that torch searches by squared L2 distance, all of them for each query.

    Args:
        entries: Keys or codes on a device.
        key_size: D.
        block: Distances that are held at a time.
    """

    nlist = None
    metric: Metric = "l2"

    def __init__(self, entries: _Exact | _Coded, key_size: int, block: int = BLOCK) -> None:
        self._entries, self.key_size, self._block = entries, key_size, block

    @classmethod
    def exact(cls, keys: Tensor, block: int = BLOCK) -> Self:
        """Search among keys of shape (N, D), float32 or half as large, on their device."""
        norms = torch.cat([part.float().square().sum(1) for part in keys.split(1 << 16)]) if len(keys) else keys.sum(1)
        return cls(_Exact(keys, norms.float()), keys.shape[1], block)

    @classmethod
    def of(cls, index: FaissIndex, device: torch.device | str = "cpu", block: int = BLOCK) -> Self:
        """Search on a device among what a FAISS index holds: the keys of Flat, or the codes of PQ and IVF,PQ.

        With IVF, the entries of all lists are compared, as with nprobe = nlist; a Refine around codes is left out.

        Raises:
            ValueError: It is of another family or metric.
        """
        if index.metric != "l2":
            raise ValueError(f"metric is {index.metric}, expected l2 for a search by torch")
        if all(isinstance(innermost(part), faiss.IndexFlat) for part in index.parts):
            found = [part.reconstruct_n(0, part.ntotal) for part in index.parts if part.ntotal]
            keys = np.concatenate([np.empty((0, index.key_size), np.float32), *found])
            return cls.exact(torch.from_numpy(keys).to(device), block)
        stored = stored_codes(index)
        if stored is None:
            name = type(innermost(index.index)).__name__
            raise ValueError(f"the index is a {name}, expected Flat, PQ or IVF,PQ for a search by torch")
        places = torch.from_numpy(stored.codes).int() + 256 * torch.arange(stored.codes.shape[1], dtype=torch.int32)
        if stored.lists is not None:
            last = 256 * stored.codes.shape[1] + torch.from_numpy(stored.lists)
            places = torch.cat([places, last[:, None].int()], 1)
        rest = (stored.norms, stored.codebooks, stored.lists, stored.centroids, stored.matrix, stored.offset)
        moved = (None if part is None else torch.from_numpy(part).to(device) for part in rest)
        return cls(_Coded(places.to(device), *moved), index.key_size, block)  # type: ignore[arg-type]

    def is_on(self, device: torch.device) -> bool:
        """Whether it is on a device."""
        return self._entries.norms.device == device

    def to(self, device: torch.device | str) -> Self:
        """The same index on another device."""
        moved = {name: part.to(device) for name, part in vars(self._entries).items() if part is not None}
        return type(self)(replace(self._entries, **moved), self.key_size, self._block)

    def without(self, gone: Tensor) -> Self:
        """The same index, which never finds some entries.

        Args:
            gone: True for those, shape (N,).
        """
        norms = self._entries.norms.masked_fill(gone.to(self._entries.norms.device), torch.inf)
        return type(self)(replace(self._entries, norms=norms), self.key_size, self._block)

    @property
    def device(self) -> str:
        """Where it is searched."""
        return f"{self._entries.norms.device}, by torch"

    def __len__(self) -> int:
        return len(self._entries.norms)

    def search_tensors(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """The k nearest entries of queries (R, D), on the index's device.

        Returns:
            Squared L2 distances, float32, and entry numbers, shapes (R, K), nearest first; +inf and −1 where there are
            no more.

        Raises:
            ValueError: The queries have another D, or k is too small.
        """
        check_at_least(1, k=k)
        if queries.ndim != 2 or queries.shape[1] != self.key_size:
            raise ValueError(
                f"queries have shape {tuple(queries.shape)}, expected (R, {self.key_size}) as the index's keys"
            )
        queries = queries.detach().to(self._entries.norms.device).float()
        best = queries.new_full((len(queries), k), torch.inf)
        ids = torch.full((len(queries), k), -1, dtype=torch.long, device=queries.device)
        if not len(queries):
            return best, ids
        prepared, step = self._entries.prepared(queries), max(k, self._block // len(queries))
        for first in range(0, len(self), step):
            near = self._entries.nearness(prepared, slice(first, first + step))
            near, places = near.topk(min(k, near.shape[1]), 1, largest=False)
            best, order = torch.cat([best, near], 1).topk(k, 1, largest=False)
            ids = torch.cat([ids, places + first], 1).gather(1, order)
        ids = ids.masked_fill(best.isinf(), -1)
        return (best + self._entries.norms_of(queries)).clamp(min=0), ids

    def search(
        self, queries: NDArray[np.float32], k: int, nprobe: int = 8, ef_search: int | None = None
    ) -> tuple[Distances, Ids]:
        """As `search_tensors`, for queries in numpy; nprobe and ef_search change nothing."""
        distances, ids = self.search_tensors(torch.from_numpy(np.ascontiguousarray(queries, np.float32)), k)
        return distances.cpu().numpy(), ids.cpu().numpy()
