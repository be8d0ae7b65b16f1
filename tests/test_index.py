"""Indexes against brute force in numpy and FAISS's own figures."""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from sklearn.metrics import homogeneity_score
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig, choose_factory
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.storage.errors import DatastoreError

ENTRIES, KEY_SIZE = 900, 16
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
QUERIES = clumpy_keys(33, KEY_SIZE, seed=1)[0].astype(np.float32)
WITH_LISTS = ["IVF8,Flat", "IVF8,PQ4x4fs", "IVF8,PQ4x4fs,Refine(SQfp16)", "OPQ4,IVF8,PQ4x4fs", "IVF8_HNSW4,SQ8"]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Datastore]:
    with write_store(tmp_path / "store", KEYS, VALUES, [500, 1, 399]) as store:
        yield store


def brute_force(keys: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances and entry numbers of the k nearest, by a double loop."""
    distances = np.array([[((query - key) ** 2).sum() for key in keys.astype(np.float64)] for query in QUERIES])
    ids = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, ids, 1), ids


def recall(found: np.ndarray, ids: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / len(b) for a, b in zip(found, ids, strict=True)]))


def memory_of(store: Datastore, factory: str = "Flat") -> DatastoreMemory:
    build_index(store, IndexConfig(factory, overwrite=True))
    return DatastoreMemory(store, open_index(store))


def search(store: Datastore, factory: str = "Flat", k: int = 10, nprobe: int = 1000) -> Neighbors:
    return memory_of(store, factory).search(torch.from_numpy(QUERIES), k, nprobe)


@pytest.mark.parametrize("factory", ["auto", "Flat", "IVF8,Flat"])
@pytest.mark.parametrize("k", [1, 10])
def test_neighbors_are_those_of_brute_force_when_every_list_is_probed(store: Datastore, factory: str, k: int) -> None:
    found = search(store, factory, k)
    distances, ids = brute_force(KEYS, k)
    assert found.ids.tolist() == ids.tolist()
    np.testing.assert_allclose(found.distances.numpy(), distances, rtol=1e-4, atol=1e-3)
    assert found.values.tolist() == VALUES[ids].tolist()
    assert found.values.dtype == torch.int64


def test_a_refined_index_with_all_lists_finds_what_brute_force_finds(store: Datastore) -> None:
    found = search(store, "IVF8,PQ8x4fs,Refine(SQfp16)", k=10)
    distances, ids = brute_force(KEYS, 10)
    assert recall(found.ids.numpy(), ids) > 0.9
    exact = ((QUERIES[:, None] - KEYS[found.ids.numpy()].astype(np.float64)) ** 2).sum(2)
    np.testing.assert_allclose(found.distances.numpy(), exact, rtol=1e-3)
    assert distances[:, 0] == pytest.approx(found.distances[:, 0].numpy(), rel=0.5)


def test_fewer_lists_probed_find_a_part_of_the_neighbors_at_true_distances(store: Datastore) -> None:
    memory = memory_of(store, "IVF8,Flat")
    few, more, again = (memory.search(torch.from_numpy(QUERIES), ENTRIES, nprobe) for nprobe in (1, 3, 1))
    assert again.ids.equal(few.ids)
    assert ((more.ids >= 0).sum(1) > (few.ids >= 0).sum(1)).all()
    lists = memory.index.list_of_entries()
    assert lists is not None
    for ids in few.ids.numpy():
        assert len(set(lists[ids[ids >= 0]])) == 1
        assert (ids >= 0).sum() == (lists == lists[ids[0]]).sum()
    found = few.ids >= 0
    exact = ((QUERIES[:, None] - KEYS[few.ids.clamp(min=0).numpy()].astype(np.float64)) ** 2).sum(2)
    np.testing.assert_allclose(few.distances[found].numpy(), exact[found.numpy()], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factory", ["Flat", "IVF2,Flat", "HNSW8,Flat"])
def test_more_neighbors_than_entries_are_missing_at_the_end(tmp_path: Path, factory: str) -> None:
    with write_store(tmp_path / "small", KEYS[:7], VALUES[:7] + 1) as store:
        found = search(store, factory, k=12)
    assert found.ids[:, :7].sort(1).values.tolist() == [list(range(7))] * len(QUERIES)
    assert (found.ids[:, 7:] == -1).all()
    assert (found.values[:, 7:] == 0).all()
    assert (found.values[:, :7] > 0).all()
    assert found.distances[:, :7].isfinite().all()
    assert (found.distances[:, 7:] == torch.inf).all()


def test_shards_are_searched_as_one_file_is(tmp_path: Path) -> None:
    results = []
    for name, sizes in (("whole", [ENTRIES]), ("parts", [1, 300, 98, 501])):
        with write_store(tmp_path / name, KEYS, VALUES, sizes) as store:
            results.append(search(store, "IVF8,PQ4x4fs", nprobe=3))
    assert results[0].ids.equal(results[1].ids)
    assert results[0].distances.equal(results[1].distances)
    assert results[0].values.equal(results[1].values)


@pytest.mark.parametrize("factory", WITH_LISTS)
def test_lists_of_entries_are_those_that_faiss_assigns(store: Datastore, factory: str) -> None:
    report = build_index(store, IndexConfig(factory, chunk=128))
    index = open_index(store)
    sizes, lists = index.list_sizes(), index.list_of_entries()
    assert sizes is not None and lists is not None
    assert index.nlist == report.nlist == len(sizes) == 8
    assert np.bincount(lists, minlength=8).tolist() == sizes.tolist()
    inner, keys = index.index, KEYS.astype(np.float32)
    if isinstance(inner, faiss.IndexRefine):
        inner = faiss.downcast_index(inner.base_index)
    if isinstance(inner, faiss.IndexPreTransform):
        keys = inner.chain.at(0).apply(keys)
        inner = faiss.downcast_index(inner.index)
    assert lists.tolist() == inner.quantizer.search(keys, 1)[1][:, 0].tolist()
    assert report.imbalance_factor == pytest.approx(inner.invlists.imbalance_factor(), rel=1e-5)
    assert report.imbalance_factor > 1.1
    assert report.homogeneity == pytest.approx(homogeneity_score(VALUES, lists), abs=1e-6)


@pytest.mark.parametrize("factory", ["Flat", "HNSW8,Flat", "PQ4x4fs"])
def test_an_index_without_lists_has_no_balance(store: Datastore, factory: str) -> None:
    report = build_index(store, IndexConfig(factory))
    index = open_index(store)
    assert (report.nlist, report.imbalance_factor, report.homogeneity) == (None, None, None)
    assert index.list_sizes() is None and index.list_of_entries() is None
    assert index.search(QUERIES, 5, nprobe=1)[1].tolist() == index.search(QUERIES, 5, nprobe=5)[1].tolist()


def test_report_says_what_was_built(store: Datastore) -> None:
    report = build_index(store, IndexConfig("IVF8,Flat", train_points=300, seed=4, name="small"))
    assert IndexReport.load(store.folder / "small.json") == report
    assert (report.factory, report.entries, report.key_size) == ("IVF8,Flat", ENTRIES, KEY_SIZE)
    assert (report.train_points, report.seed) == (300, 4)
    assert set(report.seconds) == {"sample", "train", "add", "write"}
    assert not list(store.folder.glob("*.partial"))


def test_an_index_with_the_same_settings_is_kept(store: Datastore) -> None:
    config = IndexConfig("IVF8,Flat", train_points=5000)
    first = build_index(store, config)
    written = (store.folder / "index.faiss").stat().st_mtime_ns
    assert build_index(store, config) == first
    assert build_index(store, replace(config, overwrite=True)) == first
    assert build_index(store, replace(config, train_points=None)) == first  # both are all keys
    assert (store.folder / "index.faiss").stat().st_mtime_ns == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factory": "Flat"}, "factory IVF8,Flat against Flat"),
        ({"seed": 2}, "seed 1 against 2"),
        ({"train_points": 400}, "train_points 900 against 400"),
    ],
)
def test_an_index_with_other_settings_is_refused_and_replaced_when_asked(
    store: Datastore, change: dict[str, object], message: str
) -> None:
    config = IndexConfig("IVF8,Flat")
    build_index(store, config)
    other = replace(config, **change)
    with pytest.raises(DatastoreError, match=f"already holds another index: {message} .*overwrite: true"):
        build_index(store, other)
    report = build_index(store, replace(other, overwrite=True))
    assert {name: getattr(report, name) for name in change} == change


def test_an_index_of_other_keys_is_refused_at_search_and_replaced_at_build(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with write_store(folder, KEYS, VALUES) as store:
        before = build_index(store, IndexConfig("Flat"))
    for path in [*folder.glob("shard-*"), folder / "manifest.json"]:
        path.unlink()
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in list(folder.iterdir()):
        path.unlink()
    folder.rmdir()
    with write_store(folder, KEYS + np.float16(0.5), VALUES) as store:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        with pytest.raises(DatastoreError, match=rf"indexes 900 keys of the datastore {before.datastore_sha256[:12]}"):
            open_index(store)
        after = build_index(store, IndexConfig("Flat"))
        assert after.datastore_sha256 != before.datastore_sha256
        assert len(open_index(store)) == ENTRIES


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("index.faiss", b"no index at all", r"index.faiss is damaged .its checksum is another"),
        ("index.json", b"{", "index.json is damaged"),
        ("index.json", b'{"factory": "Flat"}', "index.json has format None, expected 2"),
        ("index.json", b'{"format": 2}', "index.json is damaged .its checksum does not fit"),
    ],
)
def test_a_damaged_index_does_not_open_and_is_built_again(
    store: Datastore, name: str, content: bytes, message: str
) -> None:
    report = build_index(store, IndexConfig("Flat"))
    (store.folder / name).write_bytes(content)
    with pytest.raises(DatastoreError, match=f"{message}.*build it again|{message}.*build the index again"):
        open_index(store)
    assert replace(build_index(store, IndexConfig("Flat")), seconds=report.seconds) == report
    assert len(open_index(store)) == ENTRIES


def test_an_index_of_a_datastore_that_was_built_anew_meanwhile_is_refused(store: Datastore, tmp_path: Path) -> None:
    write_store(tmp_path / "other", KEYS[::-1], VALUES[::-1]).close()
    (tmp_path / "other" / "manifest.json").replace(store.folder / "manifest.json")
    with pytest.raises(DatastoreError, match=r"store was built anew after it was opened; open it again"):
        build_index(store, IndexConfig("Flat"))
    assert not list(store.folder.glob("*.faiss*"))


def test_an_index_that_is_not_there_is_refused(store: Datastore, tmp_path: Path) -> None:
    with pytest.raises(DatastoreError, match=r"has no index called 'other'; build it with build_index.py"):
        open_index(store, "other")
    with pytest.raises(FileNotFoundError, match=r"none.faiss does not exist; build it with build_index.py"):
        FaissIndex.load(tmp_path / "none.faiss")


def test_an_empty_datastore_has_an_index_that_finds_nothing(tmp_path: Path) -> None:
    with write_store(tmp_path / "store", KEYS[:0], VALUES[:0]) as store:
        report = build_index(store, IndexConfig())
        assert (report.factory, report.entries) == ("Flat", 0)
        found = DatastoreMemory(store, open_index(store)).search(torch.from_numpy(QUERIES), k=3)
    assert (found.ids == -1).all() and (found.values == 0).all() and (found.distances == torch.inf).all()
    assert found.ids.shape == found.values.shape == found.distances.shape == (len(QUERIES), 3)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("IVF8,Nonsense", "factory is 'IVF8,Nonsense', which FAISS cannot make for keys of 16 dimensions"),
        ("IVF8,PQ5x4fs", "cannot make for keys of 16 dimensions .*number of sub-quantizers that divides D"),
        ("IVF1000,Flat", "with 1000 lists, but there are only 900 training points of 900 entries; expected at least"),
        ("OPQ4,IVF1000,PQ4x4fs", "with 1000 lists, but there are only 900 training points"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(store: Datastore, factory: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(store, IndexConfig(factory))
    assert not list(store.folder.glob("index*"))


def test_too_few_training_points_are_refused(store: Datastore) -> None:
    with pytest.raises(ValueError, match="with 64 lists, but there are only 63 training points of 900 entries"):
        build_index(store, IndexConfig("IVF64,Flat", train_points=63))
    with pytest.raises(ValueError, match=r"'IVF4,PQ4', which FAISS cannot train on 200 keys .*at least 256 keys"):
        build_index(store, IndexConfig("IVF4,PQ4", train_points=200))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_points": 0}, "train_points is 0, expected 1 or more"),
        ({"chunk": 0}, "chunk is 0, expected 1 or more"),
        ({"name": "a/b"}, "name is 'a/b', expected a file name without folders"),
        ({"name": ""}, "name is '', expected a file name"),
        ({"name": "a.trained"}, "name is 'a.trained', expected a file name without folders and dots"),
        ({"name": "manifest"}, "name is 'manifest', expected another than those that the datastore uses itself"),
        ({"name": "build"}, "name is 'build', expected another"),
    ],
)
def test_index_options_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexConfig(**options)


def test_an_index_of_inner_products_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the index has FAISS metric 0, expected METRIC_L2 \(1\); build it anew"):
        FaissIndex(faiss.IndexFlatIP(4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0, expected 1 or more"),
        ({"k": 4, "nprobe": 0}, "nprobe is 0, expected 1 or more"),
        ({"k": 4, "ef_search": 0}, "ef_search is 0, expected 1 or more"),
    ],
)
def test_search_options_under_1_are_refused(store: Datastore, options: dict[str, int], message: str) -> None:
    memory = memory_of(store)
    for refuse in (WholeStore, lambda **options: memory.search(torch.from_numpy(QUERIES), **options)):
        with pytest.raises(ValueError, match=message):
            refuse(**options)
    with pytest.raises(ValueError, match=message):
        memory.index.search(QUERIES, **options)


def test_an_index_of_another_size_is_refused(store: Datastore) -> None:
    for entries, key_size, message in (
        (ENTRIES - 1, KEY_SIZE, "the index holds 899 entries and the datastore .* 900; build the index again"),
        (ENTRIES, 8, "the index holds keys of 8 dimensions and the datastore .* of 16; build the index again"),
    ):
        index = faiss.IndexFlatL2(key_size)
        index.add(KEYS[:entries, :key_size].astype(np.float32))
        with pytest.raises(DatastoreError, match=message):
            DatastoreMemory(store, FaissIndex(index))


@pytest.mark.parametrize("key_size", [1, 6, 24, 128, 513, 1024])
@pytest.mark.parametrize("entries", [0, 5000, 5001, 3_000_000])
def test_automatic_choice_is_a_factory_that_faiss_makes(entries: int, key_size: int) -> None:
    factory = choose_factory(entries, key_size)
    assert (factory == "Flat") == (entries <= 5000)
    index = faiss.index_factory(key_size, factory)
    if entries > 5000:
        nlist = faiss.downcast_index(index.base_index).nlist
        assert entries**0.5 / 2 < nlist < entries**0.5 * 2


def test_automatic_index_scores_more_candidates_again_than_it_returns(tmp_path: Path) -> None:
    keys, values = clumpy_keys(5200, KEY_SIZE, seed=2)
    with write_store(tmp_path / "store", keys, values) as store:
        report = build_index(store, IndexConfig())
        index = open_index(store)
        _, found = index.search(QUERIES, 8, nprobe=64)
        index.index.k_factor = 1
        _, without = index.search(QUERIES, 8, nprobe=64)
    assert report.factory == "IVF64,PQ8x4fs,Refine(SQfp16)"
    assert report.train_points == 5200
    _, ids = brute_force(keys, 8)
    assert recall(found, ids) > recall(without, ids) + 0.2


def test_step_benchmark_gives_its_ratio_beside_all_settings(tmp_path: Path) -> None:
    sizes = {"queries": 6, "entries": 300, "key-size": 8, "vocabulary": 400, "k": 5, "repeats": 3}
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "step.py"
    options = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    out = subprocess.run(
        [sys.executable, str(script), "--quick", "--json", str(tmp_path / "out.json"), *options],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = json.loads((tmp_path / "out.json").read_text())
    medians = result["median_ms"]
    assert result["ratio"] == pytest.approx(medians["retrieve and mix"] / medians["search alone"], rel=0.5)
    assert f"ratio {result['ratio']} " in out.stdout
    assert result["largest_difference_of_log_probabilities"] < 1e-4
    assert result["settings"].items() >= {name.replace("-", "_"): value for name, value in sizes.items()}.items()
    assert result["threads"]["torch"] == 1 and result["processor"]
    assert {"python", "torch", "numpy"} <= set(result["libraries"])
