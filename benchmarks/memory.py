"""Resident memory of building an index and of searching in it, each in a process of its own; Linux only."""

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import common
import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.memory import DatastoreMemory

STATUS = Path("/proc/self/status")
T = TypeVar("T")


@dataclass(frozen=True)
class Memory:
    """What a process had in memory, in MB.

    Attributes:
        idle: Before the work: interpreter and libraries.
        peak: Most that was resident, pages of mapped files counted, which the system takes back when it needs them.
        anonymous: Of what was resident in the end, all that is in no file: the process cannot do without.
    """

    idle: float
    peak: float
    anonymous: float


class OwnProcesses:
    """Does pieces of work in processes whose memory is their own.

    All are forked from one that has imported what they need and done nothing else: importing takes seconds.
    """

    def __init__(self) -> None:
        self._origin = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))  # starts with the first work

    def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """Do some work."""
        return self._origin.submit(_forked, work, *arguments).result()

    def __enter__(self) -> "OwnProcesses":
        return self

    def __exit__(self, *error: object) -> None:
        self._origin.shutdown()


def _forked(work: Callable[..., T], *arguments: Any) -> T:
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(work, *arguments).result()


def resident() -> dict[str, float]:
    """This process's peak of resident memory, and what is anonymous now, in MB.

    `getrusage` would count the parent's peak too, which a new process starts with.
    """
    lines = (line.split(":") for line in STATUS.read_text().splitlines())
    status = {name: value.split() for name, value in lines}
    return {name: int(status[field][0]) / 1024 for name, field in (("peak", "VmHWM"), ("anonymous", "RssAnon"))}


def measured_build(folder: Path, config: IndexConfig, threads: int) -> tuple[IndexReport, Memory]:
    """Build an index."""
    common.set_threads(threads)
    with Datastore(folder) as store:
        idle = resident()["peak"]
        report = build_index(store, config)
        return report, Memory(idle, **resident())


def measured_search(
    folder: Path, name: str, queries: NDArray[np.float32], k: int, nprobe: int, rescore: int, mmap: bool, threads: int
) -> Memory:
    """Open an index and search in it for all queries at once."""
    common.set_threads(threads)
    with Datastore(folder) as store:
        idle = resident()["peak"]
        memory = DatastoreMemory(store, open_index(store, name, mmap))
        memory.search(torch.from_numpy(queries), k, nprobe, rescore)
        return Memory(idle, **resident())


def codes_mb(index: FaissIndex) -> float:
    """Size of an index's codes alone, without entry numbers, centroids and the links of a graph."""
    return sum(part.ntotal * _code_size(part) for part in index.parts) / 2**20


def _code_size(index: faiss.Index) -> int:
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return _code_size(inner.index)
    if isinstance(inner, faiss.IndexRefine):
        return _code_size(inner.base_index) + _code_size(inner.refine_index)
    return int((inner.storage if hasattr(inner, "storage") else inner).sa_code_size())
