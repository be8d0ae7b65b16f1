"""Exact distances from stored keys against brute force."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.rescoring import rescore
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import DatastoreMemory

ENTRIES, KEY_SIZE, K = 900, 16, 10
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
QUERIES = clumpy_keys(33, KEY_SIZE, seed=1)[0].astype(np.float32)
SQUARED = ((QUERIES[:, None].astype(np.float64) - KEYS[None].astype(np.float64)) ** 2).sum(2)
NEAREST = SQUARED.argsort(axis=1, kind="stable")[:, :K]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with write_store(tmp_path_factory.mktemp("rescoring") / "store", KEYS, VALUES, [500, 1, 0, 399]) as store:
        for factory, name in (("IVF8,PQ4x4fs", "codes"), ("HNSW8", "graph")):
            build_index(store, IndexConfig(factory, name=name))
        build_index(store, IndexConfig("IVF8,PQ4x4fs", name="parts", layout="shards", part_entries=300))
        yield store


def find(store: Datastore, name: str, k: int = K, nprobe: int = 8, rescore: int = 0) -> Neighbors:
    return DatastoreMemory(store, open_index(store, name)).search(torch.from_numpy(QUERIES), k, nprobe, rescore)


@pytest.mark.parametrize("name", ["codes", "parts"])
def test_all_entries_scored_again_are_brute_force_however_coarse_the_codes(store: Datastore, name: str) -> None:
    plain, exact = find(store, name), find(store, name, rescore=ENTRIES)
    assert exact.ids.tolist() == NEAREST.tolist()
    assert exact.values.tolist() == VALUES[NEAREST].tolist()
    np.testing.assert_allclose(exact.distances.numpy(), np.take_along_axis(SQUARED, NEAREST, 1), rtol=1e-5)
    assert plain.ids.tolist() != exact.ids.tolist()


def test_more_candidates_find_more_at_exact_distances(store: Datastore) -> None:
    recall = []
    for candidates in (K, 4 * K, 16 * K):
        found = find(store, "codes", rescore=candidates)
        ids = found.ids.numpy()
        np.testing.assert_allclose(found.distances.numpy(), np.take_along_axis(SQUARED, ids, 1), rtol=1e-5)
        assert (np.diff(found.distances.numpy(), axis=1) >= 0).all()
        recall.append(np.mean([np.isin(a, b).mean() for a, b in zip(ids, NEAREST, strict=True)]))
    assert recall[0] < recall[1] < recall[2] and recall[2] > 0.9


def test_candidates_that_are_missing_stay_missing_at_the_end(store: Datastore) -> None:
    candidates = np.full((len(QUERIES), 7), -1)
    candidates[:, [1, 4]] = [[3, 899]]
    candidates[5] = -1
    distances, ids = rescore(QUERIES, candidates, MappedKeys(store), 4)
    assert (ids[5] == -1).all() and np.isinf(distances[5]).all()
    for row in set(range(len(QUERIES))) - {5}:
        assert ids[row].tolist() == [*sorted((3, 899), key=lambda entry: SQUARED[row, entry]), -1, -1]
        np.testing.assert_allclose(distances[row, :2], SQUARED[row, ids[row, :2]], rtol=1e-5)
        assert np.isinf(distances[row, 2:]).all()


def test_an_index_that_finds_no_more_than_there_is_can_be_scored_again(store: Datastore) -> None:
    found = find(store, "codes", nprobe=1, rescore=2000)
    lists = open_index(store, "codes").list_of_entries()
    for ids, squared in zip(found.ids.numpy(), SQUARED, strict=True):
        ids = ids[ids >= 0]
        among = np.flatnonzero(lists == lists[ids[0]])
        assert ids.tolist() == among[squared[among].argsort(kind="stable")][:K].tolist()


def test_no_queries_have_no_neighbors(store: Datastore) -> None:
    for name in ("graph", "codes", "parts"):
        found = DatastoreMemory(store, open_index(store, name)).search(torch.empty(0, KEY_SIZE), K, rescore=20)
        assert found.ids.shape == found.distances.shape == found.values.shape == (0, K)


def test_an_empty_store_is_scored_again_without_finding_anything(tmp_path: Path) -> None:
    with write_store(tmp_path / "empty", KEYS[:0], VALUES[:0]) as store:
        build_index(store, IndexConfig())
        found = find(store, "index", 3, rescore=5)
    assert (found.ids == -1).all() and found.ids.shape == (len(QUERIES), 3)


def test_fewer_candidates_than_neighbors_are_refused() -> None:
    message = "rescore is 7, expected 0, or k = 8 candidates or more"
    with pytest.raises(ValueError, match=message):
        KnnSettings(k=8, rescore=7)
    with pytest.raises(ValueError, match=message):
        WholeStore(8, rescore=7)
    assert KnnSettings(k=8, rescore=8).rescore == 8


def test_keys_are_the_same_and_few_pages_stay_mapped_when_others_are_let_go(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lightning_knnmt.datastore.mapped_keys.WINDOW_BYTES", 640)  # 20 keys
    monkeypatch.setattr("lightning_knnmt.datastore.mapped_keys.MOST_WINDOWS", 20)
    keys, most, rng = MappedKeys(store), [], np.random.default_rng(4)
    for size in (1, 5, 30, ENTRIES):
        rows = rng.choice(ENTRIES, size, replace=False)
        assert keys.rows(rows).tolist() == KEYS[rows].tolist()
        most.append(int(keys._mapped.sum()))
        assert most[-1] <= keys._at_most <= 10
    assert most[1] > most[0] > 0


@pytest.mark.parametrize("entry", [-1, ENTRIES, np.iinfo(np.int64).min])
def test_an_entry_that_is_not_there_is_an_error_and_no_crash(store: Datastore, entry: int) -> None:
    with pytest.raises(IndexError, match="out of bounds"):
        MappedKeys(store).rows(np.array([3, entry]))
