"""Several processes with a part of the index each, against one process with all of it."""

import multiprocessing
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from tiny_stores import clumpy_keys, write_store
from torch import distributed

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.distributed import DistributedIndex
from lightning_knnmt.index.opening import open_index, open_parts
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.storage.ranks import Ranks

ENTRIES, KEY_SIZE, K = 900, 16, 10
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
QUERIES = clumpy_keys(60, KEY_SIZE, seed=1)[0].astype(np.float32)
SHARDS = IndexConfig(layout="shards", part_entries=250)
FACTORIES = {"flat": "Flat", "lists": "IVF8,SQ8", "fast": "IVF8,RaBitQfs"}
# [step][process -> rows of QUERIES]: different numbers, none, and a process that ends before the other
STEPS = [[range(0, 5), range(5, 25)], [range(25, 26), range(0)], [range(26, 30), range(30, 33)], [range(33, 60), None]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed") / "store"
    with write_store(folder, KEYS, VALUES, [200, 150, 1, 0, 249, 300]) as store:
        for name, factory in FACTORIES.items():
            build_index(store, replace(SHARDS, factory=factory, name=name))
            build_index(store, IndexConfig(factory, name=f"{name}_whole"))
    return folder


def run_ranks(size: int, work: Callable[..., Any], tmp_path: Path, *args: Any) -> list[Any]:
    """What each process of a group returns; the error of one is a string."""
    context = multiprocessing.get_context("forkserver")  # which imports everything once
    context.set_forkserver_preload(["lightning_knnmt.building.index", "lightning_knnmt.memory"])
    queue = context.Queue()
    rendezvous = f"file://{tmp_path}/rendezvous"
    processes = [
        context.Process(target=run_rank, args=(rank, size, rendezvous, queue, work, args)) for rank in range(size)
    ]
    for process in processes:
        process.start()
    results = dict(queue.get(timeout=600) for _ in processes)
    for process in processes:
        process.join()
    return [results[rank] for rank in range(size)]


def run_rank(rank: int, size: int, rendezvous: str, queue: Any, work: Callable[..., Any], args: tuple) -> None:
    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    distributed.init_process_group("gloo", rendezvous, timedelta(minutes=10), world_size=size, rank=rank)
    try:
        queue.put((rank, work(rank, size, *args)))
    except Exception as error:
        queue.put((rank, f"{type(error).__name__}: {error}"))
    distributed.destroy_process_group()


def search_in_steps(rank: int, size: int, folder: Path) -> dict[str, list]:
    found: dict[str, list] = {}
    with Datastore(folder) as store:
        for name in FACTORIES:
            with DistributedIndex(open_parts(store, rank, size, name)) as index:
                assert len(index) == ENTRIES
                memory = DatastoreMemory(store, index)
                for step in STEPS:
                    if rank < 2 and (rows := step[rank]) is not None:
                        neighbors = memory.search(torch.from_numpy(QUERIES[rows.start : rows.stop]), K, nprobe=3)
                        arrays = (neighbors.distances, neighbors.ids, neighbors.values)
                        found.setdefault(name, []).append([array.tolist() for array in arrays])
    return found


@pytest.mark.parametrize("size", [2, 4])  # of four processes one has no entries, and two have no queries
def test_processes_with_a_part_each_find_what_one_with_all_finds(folder: Path, tmp_path: Path, size: int) -> None:
    found = run_ranks(size, search_in_steps, tmp_path, folder)
    with Datastore(folder) as store:
        for name in FACTORIES:
            memory = DatastoreMemory(store, open_index(store, f"{name}_whole"))
            for rank in range(2):
                for rows, ours in zip([step[rank] for step in STEPS], found[rank][name], strict=False):
                    whole = memory.search(torch.from_numpy(QUERIES[rows.start : rows.stop]), K, nprobe=3)
                    assert ours == [whole.distances.tolist(), whole.ids.tolist(), whole.values.tolist()]
            assert [len(rank.get(name, [])) for rank in found] == [4, 3, 0, 0][:size]


def search_wrongly(rank: int, size: int, folder: Path) -> list[str]:
    messages = []
    with Datastore(folder) as store:
        for share in (open_index(store, "flat"), open_parts(store, 1 - rank, size, "flat")):
            try:
                DistributedIndex(share)
            except ValueError as error:
                messages.append(str(error))
        index = DistributedIndex(open_parts(store, rank, size, "flat"))
        try:
            index.search(QUERIES[:3], 4 + rank)
        except ValueError as error:
            messages.append(str(error))
    return messages


def test_shares_that_overlap_and_different_k_are_refused_in_all_processes(folder: Path, tmp_path: Path) -> None:
    for messages in run_ranks(2, search_wrongly, tmp_path, folder):
        assert messages == [
            "the processes hold entries 0 to 900, 0 to 900, expected shares that follow each other; open them with "
            "open_parts",
            "the processes hold entries 350 to 900, 0 to 350, expected shares that follow each other; open them with "
            "open_parts",
            "the processes search for (k, nprobe, ef_search) (4, 8, 0), (5, 8, 0), expected the same in all",
        ]


def build_together(rank: int, size: int, folder: Path, configs: list[IndexConfig]) -> list[Any]:
    ranks = Ranks(rank, size)
    with Datastore(folder) as store:
        return [replace(build_index(store, config, ranks), seconds={}) for config in configs]


def test_an_index_built_by_several_processes_is_the_one_that_one_builds(tmp_path: Path) -> None:
    for name in ("one", "many"):
        write_store(tmp_path / name, KEYS, VALUES, [200, 150, 1, 0, 249, 300]).close()
    configs = [
        replace(SHARDS, factory="IVF8,PQ8x4fs", name="shards"),
        replace(SHARDS, factory="IVF8,PQ8x4fs,Refine(SQfp16)", name="whole", layout="whole"),
        IndexConfig("HNSW8", name="graph"),
    ]
    expected = build_together(0, 1, tmp_path / "one", configs)
    assert run_ranks(2, build_together, tmp_path, tmp_path / "many", configs) == [expected, expected]
    contents = [
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*.faiss")} for name in ("one", "many")
    ]
    assert contents[0] == contents[1] and len(contents[0]) == 6


def test_an_error_of_one_process_is_an_error_of_all(tmp_path: Path) -> None:
    write_store(tmp_path / "store", KEYS, VALUES, [450, 450]).close()
    configs = [replace(SHARDS, factory="IVF8,PQ4", train_points=100)]
    for message in run_ranks(2, build_together, tmp_path, tmp_path / "store", configs):
        assert "ValueError: factory is 'IVF8,PQ4', which FAISS cannot train on 100 keys" in message
