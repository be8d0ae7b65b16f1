"""From queries to neighbors."""

from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.rescoring import rescore
from lightning_knnmt.storage.errors import DatastoreError


@dataclass(frozen=True)
class Neighbors:
    """The K nearest stored contexts of R queries, nearest first.

    Attributes:
        distances: Squared L2, shape (R, K); +inf where there is no neighbor.
        values: Target-token ids, shape (R, K); 0 where there is no neighbor.
        ids: Entry numbers in the datastore, shape (R, K); −1 where there is no neighbor.
    """

    distances: Tensor
    values: Tensor
    ids: Tensor

    def first(self, k: int) -> "Neighbors":
        """The k nearest only."""
        return Neighbors(self.distances[:, :k], self.values[:, :k], self.ids[:, :k])


class Retriever(Protocol):
    """Finds neighbors, row by row."""

    def begin(self, batch: Batch) -> None:
        """Prepare for decoding B sentences; rows come in the order of the sentences, the beams of each together."""
        ...

    def retrieve(self, queries: Tensor) -> Neighbors:
        """Neighbors of queries of shape (R, D)."""
        ...


class SearchIndex(Protocol):
    """An index over all entries of a datastore, such as `FaissIndex`."""

    @property
    def key_size(self) -> int:
        """D."""
        ...

    def __len__(self) -> int: ...

    def set_nprobe(self, nprobe: int) -> None:
        """Choose how many lists a query scans."""
        ...

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Squared L2 distances and entry numbers, shapes (R, K), of queries of shape (R, D)."""
        ...


AnyIndex = TypeVar("AnyIndex", bound=SearchIndex)


class DatastoreRetriever(Generic[AnyIndex]):
    """Searches one index over a whole datastore, whatever the sentence.

    Args:
        datastore: The keys' values and sentences.
        index: An index over the same entries.
        k: K, neighbors of each query, 1 or more.
        nprobe: Lists that each query scans, where the index has lists.
        rescore: Candidates that the index finds for each query, of which the stored keys decide the K nearest and their
            exact distances; 0: the index decides. With it, an index of short codes needs no copy of the keys (Refine).
    """

    def __init__(self, datastore: Datastore, index: AnyIndex, k: int, nprobe: int = 8, rescore: int = 0) -> None:
        for name, value in (("k", k), ("nprobe", nprobe)):
            if value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        check_rescore(rescore, k)
        if len(index) != len(datastore):
            raise DatastoreError(
                f"the index holds {len(index)} entries and the datastore {datastore.folder} {len(datastore)}; "
                "build the index again"
            )
        if index.key_size != datastore.key_size:
            raise DatastoreError(
                f"the index holds keys of {index.key_size} dimensions and the datastore {datastore.folder} of "
                f"{datastore.key_size}; build the index again"
            )
        self.datastore, self.index, self.k, self.nprobe, self.rescore = datastore, index, k, nprobe, rescore
        self._keys = MappedKeys(datastore) if rescore else None
        self._values = torch.from_numpy(datastore.values)

    def begin(self, batch: Batch) -> None:
        """Nothing to prepare: every sentence searches the same entries."""

    def retrieve(self, queries: Tensor) -> Neighbors:
        """Neighbors of queries of shape (R, D), on the queries' device."""
        self.index.set_nprobe(self.nprobe)  # other retrievers may share the index
        rows = queries.detach().float().cpu().numpy()
        distances, ids = self.index.search(rows, max(self.k, self.rescore))
        if self._keys is not None:
            distances, ids = rescore(rows, ids, self._keys, self.k)
        entries = torch.from_numpy(ids)
        found = entries >= 0
        if len(self._values):
            values = self._values[entries.clamp(min=0)].long().masked_fill_(~found, 0)
        else:
            values = torch.zeros_like(entries)
        device = queries.device
        return Neighbors(torch.from_numpy(distances).to(device), values.to(device), entries.to(device))


def check_rescore(rescore: int, k: int) -> None:
    """Refuse fewer candidates than neighbors.

    Raises:
        ValueError: There are.
    """
    if rescore != 0 and rescore < k:
        raise ValueError(f"rescore is {rescore}, expected 0, or k = {k} candidates or more")
