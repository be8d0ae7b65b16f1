"""Built indexes, opened for search."""

import logging

import numpy as np
import torch

from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.manifest import Manifest
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.config import Device, TorchSearch
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.filtered import FilteredIndex
from lightning_knnmt.index.gpu import Gpus, find_gpus
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.index.torch_index import TorchIndex
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import description_file, generation_name, index_file, part_file

log = logging.getLogger(__name__)


def open_index(
    datastore: Datastore, name: str = "index", mmap: bool = False, device: Device = "cpu"
) -> FilteredIndex | FaissIndex:
    """Open an index of a datastore for search, refusing one that was built from other keys.

    Args:
        datastore: What it was built from.
        name: Its name.
        mmap: Leave the entries on the disk, for a store larger than memory; lists of FastScan codes are read even so.
        device: Where it is searched: `cpu`; `gpu`: in a copy divided between all GPUs; `auto`: there, if FAISS has any
            and can have the index there.

    Returns:
        The index, which does not find entries that were removed.

    Raises:
        DatastoreError: The index belongs to another datastore, or is not whole.
        ValueError: FAISS has no GPU, or no GPU version of the index, where one is asked for.
    """
    gpus = find_gpus(device)
    return _filtered(datastore, _on(gpus, device, load_index(datastore, name, mmap)))


def open_parts(
    datastore: Datastore, rank: int, size: int, name: str = "index", mmap: bool = False, device: Device = "cpu"
) -> FilteredIndex | FaissIndex:
    """Open one process's share of an index that was built with `layout: shards`.

    Args:
        datastore: What it was built from.
        rank: Number of the process, from 0.
        size: How many processes share the index; with more of them than parts, some get no entries.
        name: Its name.
        mmap: Leave the entries on the disk.
        device: As in `open_index`; each process has one GPU, which it shares if there are more processes.

    Raises:
        DatastoreError: The index belongs to another datastore, is not whole, or is in one file.
        ValueError: FAISS has no GPU, or no GPU version of the index, where one is asked for.
    """
    gpus = find_gpus(device)
    gpus = None if gpus is None else gpus.share(rank, size)
    report = read_report(datastore, name)
    if not report.parts:
        path = index_file(datastore.folder, generation_name(name, datastore.manifest.generation))
        raise DatastoreError(f"{path} is one file, expected parts; build the index with layout: shards")
    total = len(report.parts)
    numbers = range(rank * total // size, (rank + 1) * total // size)
    return _filtered(datastore, _on(gpus, device, _load(datastore, name, report, numbers, mmap)))


def open_by_torch(
    datastore: Datastore, name: str = "index", mmap: bool = False, searched: TorchSearch = "torch_keys"
) -> TorchIndex:
    """Open what torch searches in place of FAISS, removed entries included, which a `DatastoreMemory` hides.

    Args:
        datastore: Its keys, or what the index was built from.
        name: Name of the index.
        mmap: Refused: torch has all entries in memory.
        searched: `torch_keys`: all stored keys; `torch_codes`: all codes of an index of PQ or IVF,PQ (without a Refine
            around it), or all keys of a Flat one.

    Raises:
        DatastoreError: The index belongs to another datastore, or is not whole.
        ValueError: The index has another metric than l2 or codes of another kind.
    """
    if mmap:
        raise ValueError(f"mmap is True, but index_device {searched} has all entries in memory; expected False")
    if searched == "torch_codes":
        return TorchIndex.of(load_index(datastore, name))
    if (metric := read_report(datastore, name).metric) != "l2":
        raise ValueError(f"metric is {metric}, expected l2 for a search by torch")
    return TorchIndex.exact(torch.from_numpy(MappedKeys(datastore).rows(np.arange(len(datastore)))))


def load_index(datastore: Datastore, name: str = "index", mmap: bool = False) -> FaissIndex:
    """An index as it is in its files, entries that were removed included: for looking at its lists.

    Args:
        datastore: What it was built from.
        name: Its name.
        mmap: Leave the entries on the disk, where FAISS can.

    Raises:
        DatastoreError: The index belongs to another datastore, or is not whole.
    """
    report = read_report(datastore, name)
    return _load(datastore, name, report, range(len(report.parts)), mmap)


def _filtered(datastore: Datastore, index: FaissIndex) -> FilteredIndex | FaissIndex:
    return FilteredIndex(index, datastore.removed, len(datastore)) if len(datastore.removed) else index


def read_report(datastore: Datastore, name: str) -> IndexReport:
    """The description of an index.

    Raises:
        DatastoreError: There is none, or it belongs to another datastore.
    """
    stem = generation_name(name, datastore.manifest.generation)
    path, description = index_file(datastore.folder, stem), description_file(datastore.folder, stem)
    if not path.exists() or not description.exists():
        if Manifest.load(datastore.folder).generation > datastore.manifest.generation:
            raise DatastoreError(f"{datastore.folder} was changed after it was opened; open it again")
        raise DatastoreError(f"{datastore.folder} has no index called {name!r}; build it with build_index.py")
    report = IndexReport.load(description)
    if report.datastore_sha256 != datastore.fingerprint or report.entries != len(datastore):
        raise DatastoreError(
            f"{path} indexes {report.entries} keys of the datastore {report.datastore_sha256[:12]}, but "
            f"{datastore.folder} holds {len(datastore)} keys of {datastore.fingerprint[:12]}; build the index again"
        )
    return report


def _on(gpus: Gpus | None, device: Device, index: FaissIndex) -> FaissIndex:
    if gpus is not None:
        try:
            index.search_on(gpus)
        except ValueError as error:
            if device == "gpu":
                raise
            log.info("the index is searched on the CPU: %s", error)
    return index


def _load(datastore: Datastore, name: str, report: IndexReport, numbers: range, mmap: bool) -> FaissIndex:
    """Load the parts of some numbers; the trained index without entries if there are none."""
    stem = generation_name(name, datastore.manifest.generation)
    files = [part_file(datastore.folder, stem, number) for number in numbers]
    files = files or [index_file(datastore.folder, stem)]
    expected = [report.parts[number].entries for number in numbers] or [0 if report.parts else report.entries]
    first = sum(part.entries for part in report.parts[: numbers.start])
    checksums = report.checksums(index_file(datastore.folder, stem))
    for file in files:
        if datastore.hashes(file.name) and file.is_file() and file_sha256(file) != checksums[file]:
            raise DatastoreError(f"{file} is damaged (its checksum is another); build the index again")
    try:
        index = FaissIndex.load(*files, first=first, mmap=mmap, metric=report.metric)
    except (FileNotFoundError, ValueError) as error:
        raise DatastoreError(str(error)) from error
    for file, part, entries in zip(files, index.parts, expected, strict=True):
        if (part.ntotal, part.d) != (entries, datastore.key_size):
            raise DatastoreError(
                f"{file} holds {part.ntotal} keys of {part.d} dimensions, expected {entries} of {datastore.key_size}; "
                "build the index again"
            )
    return index
