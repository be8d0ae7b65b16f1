"""Memories in RAM and on disk against each other and against brute force."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stores import build_store, clumpy_keys, corpus_pairs, numbered_store, write_store

from lightning_knnmt import build_memory, load_model, open_memory
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.storage.errors import DatastoreError

PAIRS = [Pair(pair.src, pair.tgt) for pair in corpus_pairs(30)]  # documents have no place in two lists of strings
SOURCES, TARGETS = [pair.src for pair in PAIRS], [pair.tgt for pair in PAIRS]
FLAT = IndexConfig("Flat")


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def in_ram(marian: KeyedModel) -> RamMemory:
    memory = build_memory(marian, SOURCES, TARGETS)
    assert isinstance(memory, RamMemory)
    return memory


@pytest.fixture(scope="module")
def on_disk(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatastoreMemory]:
    memory = build_memory(marian, SOURCES, TARGETS, tmp_path_factory.mktemp("memory") / "store", FLAT)
    assert isinstance(memory, DatastoreMemory)
    with memory:
        yield memory


def test_the_same_lists_of_strings_are_the_same_entries_in_ram_and_on_disk(
    in_ram: RamMemory, on_disk: DatastoreMemory
) -> None:
    def entries(memory: RamMemory | DatastoreMemory) -> set[tuple[int, int, str, str]]:
        contexts = map(memory.context, range(len(memory)))
        return {(each.number, each.position, each.pair.src, each.pair.tgt) for each in contexts}

    assert len(in_ram) == len(on_disk) and in_ram.key_size == on_disk.key_size
    assert entries(in_ram) == entries(on_disk) and len(entries(in_ram)) == len(in_ram)
    assert sorted(in_ram.sources()) == sorted(on_disk.sources()) == sorted(SOURCES)
    assert in_ram.nlist is on_disk.nlist is None
    for memory in (in_ram, on_disk):
        with pytest.raises(IndexError, match=rf"entry is -1, expected 0 to {len(in_ram) - 1}"):
            memory.context(-1)


def test_a_search_in_ram_is_that_of_faiss_flat_on_the_same_keys(tmp_path: Path) -> None:
    keys, values = clumpy_keys(900, 16)
    keys = (20 * keys.astype(np.float32) + 50).astype(np.float16)  # large norms, where differences drown in rounding
    queries = torch.from_numpy((20 * clumpy_keys(33, 16, seed=1)[0] + 50).astype(np.float32))
    pairs = [Pair(f"source {row}", f"target {row}") for row in range(900)]
    ram = RamMemory(torch.from_numpy(keys), torch.from_numpy(values), pairs, [1] * 900, block=2000)
    with write_store(tmp_path / "store", keys, values, [500, 1, 399]) as store:
        build_index(store, FLAT)
        disk = DatastoreMemory(store, open_index(store))
        for k in (1, 10, 1000):
            ours, theirs = ram.search(queries, k), disk.search(queries, k)
            torch.testing.assert_close(ours.distances, theirs.distances, rtol=1e-4, atol=1e-2)
            assert ours.ids.equal(theirs.ids) and ours.values.equal(theirs.values)
            assert ours.values.dtype == theirs.values.dtype == torch.int64
        exact = ((queries[:, None].double() - torch.from_numpy(keys).double()) ** 2).sum(2)
        assert ram.search(queries, 10).ids.tolist() == exact.argsort(dim=1, stable=True)[:, :10].tolist()
        for entry in (0, 499, 500, 899):
            assert ram.context(entry) == disk.context(entry)


def test_decoding_and_tuned_distances_do_not_depend_on_where_the_memory_is(
    marian: KeyedModel, in_ram: RamMemory, on_disk: DatastoreMemory
) -> None:
    settings, decoding = KnnSettings(k=6, lambda_=0.4, temperature=20.0), Decoding(2, 4, 10)
    texts = [
        Translator(marian, settings.open(marian, m), decoding).translate(SOURCES[:6]).texts for m in (in_ram, on_disk)
    ]
    assert texts[0] == texts[1] != Translator(marian, decoding=decoding).translate(SOURCES[:6]).texts


def test_another_model_is_refused_by_both(
    backbone: KeyedModel, marian_folder: Path, in_ram: RamMemory, on_disk: DatastoreMemory
) -> None:
    other_keys = load_model(marian_folder, key_type="ffn_input", device="cpu")
    for memory, message in ((in_ram, "the memory does not fit the model"), (on_disk, "does not fit the model")):
        for model in (backbone, other_keys):
            with pytest.raises((ValueError, DatastoreError), match=message):
                KnnSettings().open(model, memory)


def test_no_queries_and_nothing_stored_find_nothing(marian: KeyedModel, tmp_path: Path) -> None:
    empty_store = build_store(marian, tmp_path / "store", [])
    build_index(empty_store, IndexConfig())
    queries = torch.randn(5, marian.key_size)
    ram = build_memory(marian, [], [])
    for memory in (ram, DatastoreMemory(empty_store, open_index(empty_store))):
        for rescore in (0, 7):
            found = memory.search(queries, 3, rescore=rescore)
            assert found.ids.shape == (5, 3) and not found.found.any() and (found.distances == torch.inf).all()
        assert list(memory.sources()) == [] and len(memory) == 0
        plain = Translator(marian, decoding=Decoding(2, 4, 8)).translate(SOURCES[:3]).texts
        mixture = KnnSettings(k=3, rescore=7).open(marian, memory)
        assert Translator(marian, mixture, Decoding(2, 4, 8)).translate(SOURCES[:3]).texts == plain


def test_no_rows_are_no_neighbors(in_ram: RamMemory, on_disk: DatastoreMemory) -> None:
    for memory in (in_ram, on_disk):
        for rescore in (0, 9):
            found = memory.search(torch.empty(0, in_ram.key_size), 4, rescore=rescore)
            assert [tuple(part.shape) for part in found.parts] == 3 * [(0, 4)]


@pytest.mark.parametrize("rescore", [0, 12])
def test_removed_entries_are_not_found_even_when_scored_again(tmp_path: Path, rescore: int) -> None:
    with numbered_store(tmp_path / "store", [20, 10]) as store:
        build_index(store, IndexConfig("Flat"))
        store.removed = Removed.of(np.array([3, 12]), np.array([9, 13]))
        memory = DatastoreMemory(store, open_index(store))
        queries = torch.tensor([[0.0, 5.2], [0.0, 12.1], [0.0, 29.0]])
        found = memory.search(queries, 3, rescore=rescore)
        left = [number for number in range(30) if not (3 <= number < 9 or number == 12)]
        expected = [sorted(left, key=lambda n: abs(n - float(q)))[:3] for q in queries[:, 1]]
        assert found.ids.tolist() == expected
        np.testing.assert_allclose(found.distances, (np.array(expected) - queries[:, 1:].numpy()) ** 2, atol=1e-3)
        assert found.values.tolist() == (np.array(expected) % 17).tolist()
        whole = memory.search(queries, 30, rescore=0)
        assert (whole.ids >= 0).sum(1).tolist() == [len(left)] * 3


def test_ef_search_of_one_search_does_not_stay_for_the_next(tmp_path: Path) -> None:
    keys, values = clumpy_keys(3000, 16)
    queries = torch.from_numpy(clumpy_keys(100, 16, seed=1)[0].astype(np.float32))
    with write_store(tmp_path / "store", keys, values) as store:
        build_index(store, IndexConfig("HNSW4"))
        build_index(store, IndexConfig("Flat", name="flat"))
        memory = DatastoreMemory(store, open_index(store))
        first, more, again = (memory.search(queries, 5, ef_search=ef) for ef in (None, 400, None))
        exact = DatastoreMemory(store, open_index(store, "flat"))
        true = exact.search(queries, 5)
        with pytest.raises(ValueError, match="ef_search is 9, but the index has no HNSW graph; leave it out"):
            exact.search(queries, 5, ef_search=9)
    assert again.ids.equal(first.ids)
    assert (more.ids == true.ids).float().mean() > (first.ids == true.ids).float().mean()


def test_what_does_not_fit_is_refused(marian: KeyedModel, in_ram: RamMemory, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there are 2 sources and 1 targets, expected as many of each"):
        build_memory(marian, ["a", "b"], ["c"])
    with pytest.raises(ValueError, match="targets has an empty text at 1, expected a translation of every source"):
        build_memory(marian, ["a", "b"], ["c", " "])
    with pytest.raises(ValueError, match=r"queries have shape \(2, 3\), expected \(R, 24\) as the keys"):
        in_ram.search(torch.zeros(2, 3), 1)
    with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
        in_ram.search(torch.zeros(2, 24), 0)
    with pytest.raises(ValueError, match="there are 4 keys, 4 values and 3 entries of pairs, expected as many of each"):
        RamMemory(torch.zeros(4, 2), torch.zeros(4), [Pair("a", "b")], [3])
    build_memory(marian, ["Öffnen"], ["Open"], str(tmp_path / "store"), FLAT).close()  # type: ignore[union-attr]
    with pytest.raises(DatastoreError):
        build_memory(marian, ["Speichern"], ["Save"], tmp_path / "store", FLAT)
    with open_memory(str(tmp_path / "store")) as memory:
        assert [memory.context(entry).pair.tgt for entry in range(len(memory))] == ["Open"] * len(memory)
