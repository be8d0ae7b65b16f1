"""Every family of indexes, from its factory string to its neighbors, against brute force."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np
import pytest
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig, choose_factory
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.opening import open_index

ENTRIES, KEY_SIZE, K = 900, 16, 10
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
QUERIES = clumpy_keys(33, KEY_SIZE, seed=1)[0].astype(np.float32)
SQUARED = ((QUERIES[:, None].astype(np.float64) - KEYS[None].astype(np.float64)) ** 2).sum(2)
NEAREST = SQUARED.argsort(axis=1, kind="stable")[:, :K]

# factory string -> least recall@10 with all lists probed, largest mean relative error of the distances
FAMILIES = {
    "Flat": (1, 1e-5),
    "SQ8": (0.97, 0.01),
    "HNSW32": (0.95, 1e-5),
    "HNSW32,SQ8": (0.93, 0.01),
    "PQ8x4": (0.4, 0.3),
    "IVF8,Flat": (1, 1e-5),
    "IVF8,SQ8": (0.97, 0.01),
    "PQ4": (0.6, 0.2),
    "IVF8,PQ4": (0.65, 0.2),
    "IVF8,PQ2": (0.5, 0.2),
    "IVF8,PQ8x4fs": (0.45, 0.25),
    "IVF8,PQ8x4fsr": (0.5, 0.2),
    "IVF8,PQ8x4fs,Refine(SQfp16)": (0.85, 1e-3),
    "OPQ4,IVF8,PQ4": (0.65, 0.2),
    "OPQ4,IVF8,PQ4x4": (0.25, 0.3),
    "OPQ8,IVF8,PQ8x4fs,Refine(SQfp16)": (0.85, 1e-3),
    "IVF8,RaBitQ": (0.25, 0.5),
    "IVF8,RaBitQ2": (0.55, 0.2),
    "IVF8,RaBitQ3": (0.75, 0.08),
    "IVF8,RaBitQ4": (0.83, 0.05),
    "IVF8,RaBitQfs": (0.25, 0.5),
    "IVF8,RaBitQfs2": (0.55, 0.2),
    "IVF8,RaBitQfs4": (0.83, 0.05),
    "IVF8_HNSW32,SQ8": (0.97, 0.01),
    "IVF8_HNSW32,PQ8x4fs,Refine(SQfp16)": (0.85, 1e-3),
    "PCA12,IVF8,SQ8": (0.45, 0.5),
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with write_store(tmp_path_factory.mktemp("families") / "store", KEYS, VALUES, [500, 1, 399]) as store:
        yield store


def name_of(factory: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in factory)


def recall(ids: np.ndarray) -> float:
    return float(np.mean([len(set(found) & set(true)) / K for found, true in zip(ids, NEAREST, strict=True)]))


def search(index: FaissIndex, nprobe: int = 8) -> tuple[np.ndarray, np.ndarray]:
    return index.search(QUERIES, K, nprobe)


@pytest.mark.parametrize("factory", FAMILIES)
def test_a_family_is_built_opened_and_finds_what_brute_force_finds(store: Datastore, factory: str) -> None:
    least, largest = FAMILIES[factory]
    report = build_index(store, IndexConfig(factory, name=name_of(factory)))
    index = open_index(store, name_of(factory))
    distances, ids = search(index)
    assert (len(index), index.key_size, report.factory) == (ENTRIES, KEY_SIZE, factory)
    assert (report.nlist == index.nlist == 8) == ("IVF" in factory)
    assert recall(ids) >= least
    exact = np.take_along_axis(SQUARED, ids, 1)
    assert np.abs(distances / exact - 1).mean() <= largest
    assert (np.diff(distances, axis=1) >= 0).all()


@pytest.mark.parametrize("factory", FAMILIES)
def test_a_mapped_index_finds_the_same_and_may_be_moved(store: Datastore, factory: str, tmp_path: Path) -> None:
    build_index(store, IndexConfig(factory, name=name_of(factory)))
    expected = search(open_index(store, name_of(factory)), nprobe=3)
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    for path in [*store.folder.glob("shard-*"), *store.folder.glob(f"{name_of(factory)}.*")]:
        shutil.copy(path, moved)
    shutil.copy(store.folder / "manifest.json", moved)
    with Datastore(moved) as other:
        index = open_index(other, name_of(factory), mmap=True)
        for found, whole in zip(search(index, nprobe=3), expected, strict=True):
            assert found.tolist() == whole.tolist()
        sizes = index.list_sizes()
        assert sizes is None or sizes.sum() == ENTRIES
    before = (moved / f"{name_of(factory)}.faiss").read_bytes()
    assert before == (store.folder / f"{name_of(factory)}.faiss").read_bytes()


@pytest.mark.parametrize(
    "factory",
    [
        "IVF8,Flat",
        "OPQ4,IVF8,PQ4x4fs",
        "IVF8,PQ8x4fs,Refine(SQfp16)",
        "OPQ8,IVF8,PQ8x4fs,Refine(SQfp16)",
        "PCA12,IVF8,SQ8",
    ],
)
def test_probed_lists_are_those_that_the_search_scans(store: Datastore, factory: str) -> None:
    build_index(store, IndexConfig(factory, name=name_of(factory)))
    index = open_index(store, name_of(factory))
    lists = index.list_of_entries()
    for nprobe in (1, 3, 20):
        probed = index.probed_lists(QUERIES, nprobe)
        assert probed.shape == (len(QUERIES), min(nprobe, 8))
        index.search(QUERIES[:1], 1, nprobe)  # which FAISS remembers
        inner = index.index
        if isinstance(inner, faiss.IndexRefine):  # which would not return all
            inner = faiss.downcast_index(inner.base_index)
        found = inner.search(QUERIES, ENTRIES)[1]
        for row in range(len(QUERIES)):
            assert set(lists[found[row][found[row] >= 0]]) <= set(probed[row].tolist())
        assert index.codes_scanned(QUERIES, nprobe).tolist() == (found >= 0).sum(1).tolist()


def test_codes_that_are_not_ordered_for_polysemous_search_give_the_same_distances(store: Datastore) -> None:
    ordered = faiss.index_factory(KEY_SIZE, "IVF8,PQ1")
    assert ordered.do_polysemous_training
    keys = KEYS.astype(np.float32)
    ordered.train(store.sample_keys(ENTRIES))
    ordered.add(keys)
    build_index(store, IndexConfig("IVF8,PQ1", name="PQ1"))
    expected, found = search(FaissIndex(ordered)), search(open_index(store, "PQ1"))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-4)


def test_an_index_without_lists_has_none_to_probe(store: Datastore) -> None:
    build_index(store, IndexConfig("Flat", name="Flat"))
    with pytest.raises(ValueError, match="the index has no inverted lists, expected one whose factory string has IVF"):
        open_index(store, "Flat").probed_lists(QUERIES, 2)


@pytest.mark.parametrize("method", ["search", "probed_lists", "codes_scanned"])
def test_queries_of_another_dimension_are_refused(store: Datastore, method: str) -> None:
    build_index(store, IndexConfig("IVF8,Flat", name=name_of("IVF8,Flat")))
    index = open_index(store, name_of("IVF8,Flat"))
    for queries in (QUERIES[:, :8], QUERIES[0]):
        with pytest.raises(ValueError, match=r"queries have shape \(.*\), expected \(R, 16\) as the index's keys"):
            getattr(index, method)(queries, 2)


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (
            "LSH",
            "factory is 'LSH', whose distances count bits that differ; expected squared L2 or inner products, from",
        ),
        ("PCA8,LSHt", "factory is 'PCA8,LSHt', whose distances count bits"),
        ("IVF8,ITQ8,SH", "factory is 'IVF8,ITQ8,SH', whose distances count bits"),
        ("IVF8,RaBitQ2fs", "factory is 'IVF8,RaBitQ2fs', which FAISS cannot make for keys of 16 dimensions"),
        ("IVF8,RaBitQ12", "factory is 'IVF8,RaBitQ12', which FAISS cannot make for keys of 16 dimensions"),
        ("OPQ5,IVF8,PQ5", "which FAISS cannot make for keys of 16 dimensions .*sub-quantizers that divides D"),
        ("IVF8,PQ3", "which FAISS cannot make for keys of 16 dimensions .*sub-quantizers that divides D"),
        ("Flat,IDMap", "factory is 'Flat,IDMap', which FAISS cannot add keys to in their order .*without IDMap"),
    ],
)
def test_a_factory_that_cannot_index_keys_by_squared_l2_is_refused(
    store: Datastore, factory: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build_index(store, IndexConfig(factory, name="refused"))
    assert not (store.folder / "refused.faiss").exists()


def test_a_file_of_an_index_that_counts_bits_is_refused(tmp_path: Path) -> None:
    faiss.write_index(faiss.IndexLSH(KEY_SIZE, 8), str(tmp_path / "lsh.faiss"))
    with pytest.raises(ValueError, match="the index counts bits that differ, expected squared L2 distances"):
        FaissIndex.load(tmp_path / "lsh.faiss")


@pytest.mark.parametrize("entries", [20_000_000, 150_000_000, 1_000_000_000])
def test_automatic_choice_for_many_entries_finds_lists_through_a_graph_when_there_are_many(entries: int) -> None:
    factory = choose_factory(entries, 64)
    assert ("_HNSW32" in factory) == (entries > 134_000_000)
    index = faiss.index_factory(64, factory)
    ivf = faiss.downcast_index(index.base_index)
    assert entries**0.5 / 2 < ivf.nlist < entries**0.5 * 2
