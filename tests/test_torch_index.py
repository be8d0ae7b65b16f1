"""Search by torch finds what FAISS finds, in keys and in the same codes, and stays on the device."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from tiny_models import GERMAN
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.index.config import IndexConfig, SearchDevice, TorchSearch
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.layers import innermost
from lightning_knnmt.index.opening import load_index
from lightning_knnmt.index.torch_index import TorchIndex
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import DatastoreMemory, open_memory
from lightning_knnmt.storage.ranks import Ranks

N, D, R, K = 900, 24, 17, 9
FACTORIES = ["Flat", "PQ8", "PQ8x4", "PQ3x4", "OPQ8,PQ8", "IVF16,PQ8", "IVF16,PQ8x4", "OPQ8,IVF16,PQ8"]


def vectors(count: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    centers = generator.normal(size=(40, D))
    return (centers[generator.integers(40, size=count)] + 0.5 * generator.normal(size=(count, D))).astype(np.float32)


@cache
def built(factory: str, count: int = N) -> FaissIndex:
    import faiss

    index = faiss.index_factory(D, factory)
    inner = innermost(index)
    if hasattr(inner, "do_polysemous_training"):
        inner.do_polysemous_training = False  # which only orders the codewords, and takes minutes
    index.train(vectors(N, 1))
    index.add(vectors(N, 1)[:count])
    return FaissIndex(index)


@pytest.mark.parametrize("block", [1 << 24, 1 << 12])
@pytest.mark.parametrize("factory", FACTORIES)
def test_the_neighbors_are_those_of_faiss(factory: str, block: int) -> None:
    index = built(factory)
    queries = vectors(R, 2)
    expected, expected_ids = index.search(queries, K, nprobe=16)
    distances, ids = TorchIndex.of(index, block=block).search(queries, K)
    assert np.allclose(distances, expected, rtol=1e-4, atol=1e-3)
    every_distance, every_id = index.search(queries, N, nprobe=16)
    of_id = np.take_along_axis(every_distance, np.argsort(every_id, 1), 1)  # equal codes are equally near
    assert np.allclose(np.take_along_axis(of_id, ids, 1), expected, rtol=1e-4, atol=1e-3)
    if factory == "Flat":
        assert (ids == expected_ids).all()
    assert (np.sort(ids, 1)[:, 1:] != np.sort(ids, 1)[:, :-1]).all()


def test_there_are_no_more_neighbors_than_entries() -> None:
    index = built("Flat", 5)
    distances, ids = TorchIndex.of(index).search(vectors(R, 2), K)
    assert (ids[:, 5:] == -1).all()
    assert np.isinf(distances[:, 5:]).all()
    assert (np.sort(ids[:, :5], 1) == np.arange(5)).all()


def test_half_precision_keys_are_searched_as_they_are() -> None:
    keys = torch.from_numpy(vectors(N, 1)).half()
    queries = torch.from_numpy(vectors(R, 2))
    distances, ids = TorchIndex.exact(keys).search_tensors(queries, K)
    brute = torch.cdist(queries.double(), keys.double()).square().topk(K, largest=False)
    assert ids.equal(brute.indices)
    assert torch.allclose(distances.double(), brute.values, atol=1e-3)


@pytest.mark.parametrize("factory", ["Flat", "PQ8", "IVF16,PQ8"])
def test_what_is_gone_is_never_found(factory: str) -> None:
    index, gone = TorchIndex.of(built(factory)), torch.arange(N) % 3 > 0
    distances, ids = index.without(gone).search_tensors(torch.from_numpy(vectors(R, 2)), N)
    found = ids[:, : N // 3]
    assert (found % 3 == 0).all()
    assert (ids[:, N // 3 :] == -1).all()
    whole = index.search_tensors(torch.from_numpy(vectors(R, 2)), N)
    assert torch.allclose(distances[:, 0], torch.where(whole[1] % 3 == 0, whole[0], torch.inf).amin(1), atol=1e-3)


def test_what_torch_cannot_search_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a IndexScalarQuantizer, expected Flat, PQ or IVF,PQ"):
        TorchIndex.of(built("SQ8"))
    index = TorchIndex.of(built("Flat"))
    with pytest.raises(ValueError, match=r"queries have shape \(2, 3\), expected \(R, 24\)"):
        index.search_tensors(torch.zeros(2, 3), 4)
    with pytest.raises(ValueError, match="k is 0, expected 1 or more"):
        index.search_tensors(torch.zeros(2, D), 0)


@pytest.fixture
def store(backbone: KeyedModel, tmp_path: Path) -> Iterator[Datastore]:
    with build_store(backbone, tmp_path / "store", corpus_pairs(20), 15) as store:
        build_index(store, IndexConfig("Flat"))
        yield store


def test_a_memory_searches_it_without_numpy(store: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    flat = load_index(store)
    memory, by_torch = DatastoreMemory(store, flat), DatastoreMemory(store, TorchIndex.of(flat))
    queries = torch.from_numpy(store.sample_keys(12)) + 0.01
    for rescore in (12, 0):
        if not rescore:
            monkeypatch.setattr(TorchIndex, "search", None)
        expected, found = (each.search(queries, 5, rescore=rescore) for each in (memory, by_torch))
        assert torch.allclose(found.distances, expected.distances, rtol=1e-3, atol=1e-2)
        assert (found.values == expected.values).float().mean() > 0.9


def translations(model: KeyedModel, folder: Path, device: SearchDevice, **settings: Any) -> list[str]:
    with open_memory(folder, device=device) as memory:
        mixture = KnnSettings(5, 0.8, 20.0, **settings).open(model, memory)
        return Translator(model, mixture, Decoding(2, 4, 12)).translate(GERMAN[:4]).texts


@pytest.mark.parametrize(("factory", "device"), [("Flat", "torch_keys"), ("IVF4,PQ8x4", "torch_codes")])
def test_the_scripts_option_gives_the_translations_of_an_exhaustive_search(
    backbone: KeyedModel, store: Datastore, factory: str, device: SearchDevice
) -> None:
    build_index(store, IndexConfig(factory, overwrite=True))
    with open_memory(store.folder, device=device) as memory:
        assert isinstance(memory.index, TorchIndex)
    plain = Translator(backbone, decoding=Decoding(2, 4, 12)).translate(GERMAN[:4]).texts
    expected = translations(backbone, store.folder, "cpu", nprobe=4)
    assert translations(backbone, store.folder, device) == expected != plain


def test_the_scripts_option_refuses_what_torch_cannot_do(store: Datastore) -> None:
    with pytest.raises(ValueError, match="mmap is True, but index_device torch_keys has all entries in memory"):
        open_memory(store.folder, mmap=True, device="torch_keys")
    with pytest.raises(ValueError, match="index_device is torch_codes, which one process searches alone, but there"):
        open_memory(store.folder, device="torch_codes", ranks=Ranks(0, 2))
    refused = pytest.raises(ValueError, match="ef_search is 16, but torch searches without a graph")
    with open_memory(store.folder, device="torch_keys") as memory, refused:
        memory.search(torch.zeros(1, store.key_size), 2, ef_search=16)
    build_index(store, IndexConfig("Flat", metric="ip", overwrite=True))
    for device in get_args(TorchSearch):
        with pytest.raises(ValueError, match="metric is ip, expected l2 for a search by torch"):
            open_memory(store.folder, device=device)
