"""An index with a search parameter, and how far what it finds is from exact search."""

import argparse
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.index.config import choose_factory, choose_nlist
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.filtered import FilteredIndex
from lightning_knnmt.index.layers import find_graph
from lightning_knnmt.index.search_index import Distances, Ids
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights, knn_probs

PARAMETERS = {"nprobe": "nprobe", "efSearch": "ef_search"}  # [FAISS's name -> ours]


@dataclass(frozen=True)
class Setting:
    """An index, and how thoroughly it is searched.

    Attributes:
        factory: As asked for.
        index: The index.
        parameter: `nprobe` or `efSearch`; None: there is nothing to choose.
        value: Of the parameter.
    """

    factory: str
    index: FaissIndex | FilteredIndex
    parameter: str | None = None
    value: int = 1

    @property
    def name(self) -> str:
        """Index and parameter."""
        return self.factory if self.parameter is None else f"{self.factory}, {self.parameter} {self.value}"

    @property
    def options(self) -> dict[str, Any]:
        """The parameter as an option of `search`."""
        return {} if self.parameter is None else {PARAMETERS[self.parameter]: self.value}

    def find(self, queries: NDArray[np.float32], k: int) -> tuple[Distances, Ids]:
        """Distances and entry numbers, shapes (R, K)."""
        return self.index.search(queries, k, **self.options)

    def search(self, queries: NDArray[np.float32], k: int, batch: int) -> None:
        """Search for some queries at a time."""
        for start in range(0, len(queries), batch):
            self.find(queries[start : start + batch], k)

    def codes_scanned(self, queries: NDArray[np.float32]) -> float | None:
        """Entries that a query is compared with, on average; unknown of a graph."""
        if self.parameter == "nprobe":
            return float(unfiltered(self.index).codes_scanned(queries, self.value).mean())
        return None if self.parameter else float(len(self.index))


def unfiltered(index: FaissIndex | FilteredIndex) -> FaissIndex:
    """The index with the entries that were removed."""
    return index.whole if isinstance(index, FilteredIndex) else index


def settings_of(factory: str, index: FaissIndex | FilteredIndex, options: argparse.Namespace) -> list[Setting]:
    """All settings of an index, the least thorough first."""
    if index.nlist is not None:
        return [Setting(factory, index, "nprobe", n) for n in sorted({min(n, index.nlist) for n in options.nprobe})]
    if find_graph(unfiltered(index).index) is None:
        return [Setting(factory, index)]
    return [Setting(factory, index, "efSearch", ef) for ef in sorted(set(options.ef_search))]


def resolve(factory: str, entries: int, key_size: int) -> str:
    """A factory string without `auto`, which stands for the whole of it or for its number of lists."""
    if factory == "auto":
        return choose_factory(entries, key_size)
    return factory.replace("IVFauto", f"IVF{choose_nlist(entries)}")


def index_name(factory: str) -> str:
    """A file name for a factory string.

    >>> index_name("IVF64,PQ8x4fs,Refine(SQfp16)")
    'IVF64-PQ8x4fs-Refine-SQfp16'
    """
    return re.sub(r"\W+", "-", factory, flags=re.ASCII).strip("-")


def recall(ids: Tensor, exact: Neighbors, k: int) -> float:
    """Share of k neighbors found, of shape (R, k); all entries as near as the k-th exact one are right."""
    distances = exact.distances
    right = distances <= distances[:, min(k, distances.shape[1]) - 1, None] * (1 + 1e-4) + 1e-6
    hits = ((ids[:, :, None] == exact.ids[:, None, :]) & right[:, None, :]).any(2).sum(1)
    return float(hits.double().mean()) / min(k, distances.shape[1])


def total_variation(found: Neighbors, exact: Neighbors, temperature: float) -> float:
    """Mean of 1 − Σ_y min(p(y), q(y)) between two kNN distributions; 1 where one of them found nothing."""
    tokens, numbers = torch.cat([found.values, exact.values], 1).unique(return_inverse=True)  # few of the vocabulary
    parts = numbers.split([found.values.shape[1], exact.values.shape[1]], 1)
    p, q = (
        knn_probs(knn_log_weights(neighbors.distances, temperature), part, len(tokens))
        for neighbors, part in zip((found, exact), parts, strict=True)
    )
    return max(0.0, 1 - float(torch.minimum(p, q).sum(1).double().mean()))
