"""A datastore with an index: the memory on disk."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.pairs import StoredContext
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.codes import stored_codes
from lightning_knnmt.index.config import SearchDevice
from lightning_knnmt.index.distributed import DistributedIndex
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.filtered import FilteredIndex
from lightning_knnmt.index.opening import open_by_torch, open_index, open_parts, read_report
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.index.rescoring import rescore as rescored
from lightning_knnmt.index.search_index import SearchIndex
from lightning_knnmt.index.torch_index import TorchIndex
from lightning_knnmt.knn.memory import consecutive
from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.knn.pooled import PooledMemory
from lightning_knnmt.knn.product_codes import ProductCodes
from lightning_knnmt.metric import Metric
from lightning_knnmt.sentences.encoders import SentenceEncoder, StatesEncoder, TransformersEncoder
from lightning_knnmt.sentences.report import REMEDY, SentencesReport
from lightning_knnmt.sentences.search import KeptSentences, SentenceSearch
from lightning_knnmt.sentences.stored import read_sentences
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import generation_name, sentences_file
from lightning_knnmt.storage.snapshot import open_together

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.storage.ranks import Ranks


class DatastoreMemory:
    """Keys, values and sentences of a datastore, searched by one of its indexes; closed at the end of a `with` block.

    Args:
        datastore: Keys and values.
        index: An index over the same entries.
        report: What is known of the index; None for one that was not built here.

    Raises:
        DatastoreError: The index holds other keys than the datastore.
    """

    def __init__(self, datastore: Datastore, index: SearchIndex, report: IndexReport | None = None) -> None:
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
        if report is not None and report.metric != index.metric:
            raise DatastoreError(
                f"the index of {datastore.folder} is searched by metric {index.metric}, expected {report.metric}, by "
                "which it was built"
            )
        if isinstance(index, TorchIndex) and len(datastore.removed):
            index = index.without(torch.from_numpy(datastore.removed.covers(np.arange(len(datastore)))))
        self.datastore, self.index, self.report = datastore, index, report
        self._values_there: Tensor | None = None  # on the device of an index of torch
        self._sentences: dict[str, SentenceSearch] = {}

    @property
    def key_size(self) -> int:
        """D."""
        return self.datastore.key_size

    @property
    def metric(self) -> Metric:
        """By what entries are near: as the index was built."""
        return self.index.metric

    @property
    def nlist(self) -> int | None:
        """Inverted lists that a query can choose from; None without lists."""
        return self.index.nlist

    def __len__(self) -> int:
        """Entries, those that were removed counted."""
        return len(self.datastore)

    def check(self, model: "KeyedModel") -> None:
        """Refuse a model whose states cannot be compared with the stored keys.

        Raises:
            DatastoreError: The store was built with another model, tokenizer, key type or language.
        """
        self.datastore.check(model)

    def search(
        self, queries: Tensor, k: int, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None
    ) -> Neighbors:
        """The k nearest entries of queries of shape (R, D), on the queries' device; see `Memory.search`."""
        check_at_least(1, k=k, nprobe=nprobe)
        if not len(self):
            return no_neighbors(len(queries), k, queries.device)
        if isinstance(self.index, TorchIndex):
            if ef_search is not None:
                raise ValueError(f"ef_search is {ef_search}, but torch searches without a graph; leave it out")
            if not rescore:
                return self._searched_by_torch(self.index, queries, k)
        rows = queries.detach().float().cpu().numpy()
        if not len(rows) and not isinstance(self.index, DistributedIndex):
            return no_neighbors(0, k, queries.device)
        distances, ids = self.index.search(rows, max(k, rescore), nprobe, ef_search)
        if ids.size and int(ids.max()) >= len(self):
            raise DatastoreError(
                f"the index of {self.datastore.folder} has found entry {int(ids.max())}, expected one below "
                f"{len(self)}; build the index again"
            )
        if rescore:
            distances, ids = rescored(rows, ids, self._keys, k, self.metric)
        entries = torch.from_numpy(ids)
        weights = None if self._weights is None else self._weights[entries.clamp(min=0)]
        found = Neighbors(torch.from_numpy(distances), self.values_of(entries), entries, weights)
        return found.to(queries.device)

    def _searched_by_torch(self, index: TorchIndex, queries: Tensor, k: int) -> Neighbors:
        """Neighbors on the queries' device, to which the index moves once."""
        if not index.is_on(queries.device):
            self.index = index = index.to(queries.device)
        distances, ids = index.search_tensors(queries, k)
        if self._values_there is None or self._values_there.device != ids.device:
            self._values_there = self._values.long().to(ids.device)
        values = self._values_there[ids.clamp(min=0)].masked_fill(ids < 0, 0)
        return Neighbors(distances, values, ids, self.weights_of(ids))

    @property
    def fingerprint(self) -> str:
        """That of the datastore's manifest: another after an append, the same after a removal."""
        return self.datastore.fingerprint

    def keys_of(self, ids: Tensor) -> Tensor:
        """Keys of some entries of shape (…), shape (…, D), float32, on the ids' device; 0 where there is none."""
        found = (ids >= 0).flatten().cpu()
        keys = torch.zeros(len(found), self.key_size)
        keys[found] = torch.from_numpy(self._keys.rows(ids.flatten().cpu()[found].numpy())).float()
        return keys.view(*ids.shape, self.key_size).to(ids.device)

    def values_of(self, ids: Tensor) -> Tensor:
        """Target-token ids of some entries of shape (…), on their device; 0 where there is none."""
        entries = ids.cpu()
        return self._values[entries.clamp(min=0)].long().masked_fill_(entries < 0, 0).to(ids.device)

    def open_sentences(self, name: str, model: "KeyedModel") -> SentenceSearch:
        """A sentence index of the datastore, which does not find sentences that were removed; kept open.

        Args:
            name: Its name.
            model: Makes vectors of the texts that are looked for, where the index has averaged encoder states.

        Raises:
            DatastoreError: There is none, it is damaged or belongs to another datastore, or its encoder is another by
                now.
        """
        if name not in self._sentences:
            self._sentences[name] = open_sentences(self.datastore, name, model)
        return self._sentences[name]

    def entries_of(self, sentences: NDArray[np.int64]) -> Tensor:
        """Entry numbers of some stored sentences, in their order, without those that were removed, shape (n,)."""
        starts, stops = (torch.from_numpy(bounds[sentences]) for bounds in self._bounds)
        entries = consecutive(starts, stops)
        if not len(self.datastore.removed):
            return entries
        return entries[torch.from_numpy(~self.datastore.removed.covers(entries.numpy()))]

    def following(self, ids: Tensor) -> Tensor:
        """The entry of the next token of the same text, shape and device as of the entries; −1 where there is none."""
        entries = ids.cpu()
        goes_on = (entries >= 0) & self._goes_on[entries.clamp(min=0)]
        return torch.where(goes_on, entries + 1, -1).to(ids.device)

    def weights_of(self, ids: Tensor) -> Tensor | None:
        """How many entries some entries stand for, where entries were merged, on their device; None: one each."""
        return None if self._weights is None else self._weights[ids.cpu().clamp(min=0)].to(ids.device)

    def product_codes(self) -> ProductCodes | None:
        """The codes of the index by entry number, copied once; None if it has no product quantization."""
        return self._codes

    @cached_property
    def _codes(self) -> ProductCodes | None:
        index = self.index.whole if isinstance(self.index, FilteredIndex) else self.index
        found = stored_codes(index) if isinstance(index, FaissIndex) and len(index) else None
        if found is None:
            return None
        parts: dict[str, Any] = {
            name: None if part is None else torch.from_numpy(part) for name, part in vars(found).items()
        }
        return ProductCodes(**parts)

    @cached_property
    def _bounds(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """First entry of each stored sentence, and the one after its last."""
        shards = [(shard.first + shard.starts[:-1], shard.first + shard.starts[1:]) for shard in self.datastore.shards]
        starts, stops = zip(*shards, strict=True) if shards else ((), ())
        nothing = np.empty(0, np.int64)
        return np.concatenate([nothing, *starts]), np.concatenate([nothing, *stops])

    @cached_property
    def _goes_on(self) -> Tensor:
        """Whether the entry after each is the next token of the same text, shape (N,)."""
        found = np.zeros(len(self), bool)
        for shard in self.datastore.shards:
            positions = shard.positions  # where entries were dropped, they have gaps
            own = found[shard.first : shard.first + len(positions)]
            own[:-1] = positions[1:] == positions[:-1] + 1
            own[shard.starts[1:] - 1] = False
        return torch.from_numpy(found)

    @cached_property
    def _values(self) -> Tensor:
        return torch.from_numpy(self.datastore.values)

    @cached_property
    def _weights(self) -> Tensor | None:
        return None if self.datastore.weights is None else torch.from_numpy(self.datastore.weights)

    @cached_property
    def _keys(self) -> MappedKeys:
        return MappedKeys(self.datastore)

    def context(self, entry: int) -> StoredContext:
        """The sentence pair that an entry comes from, and its position."""
        return self.datastore.context(entry)

    def sources(self) -> Iterator[str]:
        """The source text of every stored pair that was not removed."""
        return self.datastore.sources()

    def close(self) -> None:
        """Close the datastore's files; processes that search together wait for each other."""
        if isinstance(self.index, DistributedIndex):
            self.index.finish()
        self.datastore.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:  # after an error here, other processes get one too, once this one is gone
            self.datastore.close()


def open_pooled(
    memory: DatastoreMemory, pooled_with: Sequence[Path], index: str = "index", mmap: bool = False,
    device: SearchDevice = "cpu", checksums: bool | None = None,
) -> DatastoreMemory | PooledMemory:  # fmt: skip
    """A memory and further datastores of the same model, searched as one; the memory itself if there are none.

    Args:
        memory: The first.
        pooled_with: Folders of the others.
        index: Name of their indexes, whose metric is that of the first.
        mmap: Leave the entries of indexes on the disk.
        device: Where they are searched, as in `open_index`.
        checksums: Compare every byte with its checksum first, as in `Datastore`.

    Raises:
        DatastoreError: A datastore or its index is missing or damaged, or was built for another metric.
        ValueError: A datastore is named twice.
    """
    if not pooled_with:
        return memory
    memories: dict[str, DatastoreMemory] = {str(memory.datastore.folder): memory}
    for folder in pooled_with:
        if str(folder) in memories:
            raise ValueError(f"pooled_with has {folder}, which is searched already, expected each datastore once")
        memories[str(folder)] = open_memory(folder, index, mmap, device, metric=memory.metric, checksums=checksums)
    return PooledMemory(memories)


def open_memory(
    folder: Path | str,
    index: str = "index",
    mmap: bool = False,
    device: SearchDevice = "cpu",
    ranks: "Ranks | None" = None,
    metric: Metric | None = None,
    checksums: bool | None = None,
) -> DatastoreMemory:
    """Open a datastore and one of its indexes; what is open stays what it was, though others change it.

    Args:
        folder: The datastore's.
        index: Name of the index.
        mmap: Leave the index's entries on the disk, for one that is larger than memory.
        device: Where the index is searched, as in `open_index`; `torch_keys` and `torch_codes`: by torch, as in
            `open_by_torch`, on the device of the queries.
        ranks: This process's place among several, each of which holds a share of an index built with `layout: shards`;
            all of them search together. None: this process holds the whole index.
        metric: By what it is to be searched; None: as the index was built.
        checksums: Compare every byte with its checksum first, as in `Datastore`.

    Raises:
        DatastoreError: The datastore or the index is missing or damaged, they do not belong together, or the index was
            built for another metric.
        ValueError: FAISS has no GPU, or no GPU version of the index, where one is asked for.
    """
    folder = Path(folder)

    def attempt() -> DatastoreMemory:
        store = Datastore(folder, checksums=checksums)
        try:
            report = read_report(store, index)
            if metric not in (None, report.metric):
                raise DatastoreError(
                    f"metric is {metric}, expected {report.metric}, by which the index {index!r} of {folder} was "
                    "built; settings such as the temperature are those of one metric"
                )
            opened: SearchIndex
            if device == "torch_keys" or device == "torch_codes":
                if ranks is not None and ranks.size > 1:
                    raise ValueError(
                        f"index_device is {device}, which one process searches alone, but there are {ranks.size}; "
                        "expected cpu, gpu or auto"
                    )
                opened = open_by_torch(store, index, mmap, device)
            elif ranks is None or ranks.size == 1:
                opened = open_index(store, index, mmap, device)
            else:
                share = open_parts(store, ranks.rank, ranks.size, index, mmap, device)
                opened = DistributedIndex(share, ranks.group)
            return DatastoreMemory(store, opened, report)
        except BaseException:
            store.close()
            raise

    return open_together(folder, attempt)


def open_sentences(datastore: Datastore, name: str, model: "KeyedModel") -> SentenceSearch:
    """Open a sentence index of a datastore, refusing one that was made from other sentences.

    Args:
        datastore: What it was made from.
        name: Its name.
        model: The model that the datastore was built with.

    Raises:
        DatastoreError: There is none, it is damaged or stale, or its encoder is another by now.
    """
    path = sentences_file(datastore.folder, generation_name(name, datastore.manifest.generation))
    if not path.exists():
        raise DatastoreError(
            f"{datastore.folder} has no sentence index called {name!r} of its present sentences; {REMEDY}"
        )
    report = SentencesReport.load(path)
    if report.datastore_sha256 != datastore.fingerprint:
        raise DatastoreError(
            f"{path} belongs to the datastore {report.datastore_sha256[:12]}, but {datastore.folder} is "
            f"{datastore.fingerprint[:12]}; {REMEDY}"
        )
    if datastore.hashes(path.name) and (problem := report.problem(path)) is not None:
        raise DatastoreError(f"{path} {problem}")
    encoder: SentenceEncoder | None = None
    if report.by == "states":
        encoder = StatesEncoder(model)
    elif report.encoder is not None:
        encoder = TransformersEncoder(report.encoder)
    if encoder is not None and encoder.fingerprint != report.encoder_sha256:
        raise DatastoreError(f"the encoder {encoder.name} is another than the one that {path} was made with; {REMEDY}")
    made = read_sentences(path, report, encoder)
    kept = np.concatenate([np.empty(0, bool), *(shard.kept for shard in datastore.shards)])
    if len(kept) != len(made):
        raise DatastoreError(f"{path} holds {len(made)} sentences of {len(kept)}; {REMEDY}")
    return made if kept.all() else KeptSentences(made, kept)
