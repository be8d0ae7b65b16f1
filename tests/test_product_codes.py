"""Distances from codes against keys that FAISS decodes, and against FAISS's own search."""

from typing import Any

import faiss
import numpy as np
import pytest
import torch
from tiny_stores import clumpy_keys

from lightning_knnmt.index.codes import byte_tables, stored_codes
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.knn.product_codes import ProductCodes

PRECISE = ["IVF4,PQ4np", "OPQ4_8,IVF4,PQ4np", "PQ4np", "PCAR12,IVF4,PQ4np", "IVF4,PQ3x4np", "PCA8,OPQ4,IVF4,PQ4x4np"]
FAST = ["IVF4,PQ4x4fs", "IVF4,PQ3x4fs", "PQ4x4fs", "OPQ4,IVF4,PQ4x4fs", "IVF4,PQ4x4fsr", "IVF4,PQ4x4fs,Refine(SQfp16)"]
OTHERS = ["Flat", "IVF4,Flat", "IVF4,SQ8", "IVF4,PQ4x6np", "HNSW8", "L2norm,IVF4,PQ4np"]


def made(factory: str, parts: int = 1) -> tuple[FaissIndex, np.ndarray]:
    size = 15 if "PQ3" in factory else 16
    keys = clumpy_keys(1000, size)[0].astype(np.float32) + 1
    index = faiss.index_factory(size, factory)
    index.train(keys)
    others = [faiss.clone_index(index) for _ in range(parts - 1)]
    cuts = np.array_split(keys, parts)
    for part, own in zip((index, *others), cuts, strict=True):
        part.add(own)
    return FaissIndex(index, *others), keys


def codes_of(index: FaissIndex) -> ProductCodes:
    found = stored_codes(index)
    assert found is not None
    parts: dict[str, Any] = {name: None if p is None else torch.from_numpy(p) for name, p in vars(found).items()}
    return ProductCodes(**parts)


def adc(codes: ProductCodes, queries: np.ndarray, entries: torch.Tensor) -> np.ndarray:
    seen = codes.transformed(torch.from_numpy(queries))
    return codes.take(entries).distances(seen, codes.tables(seen)).numpy()


def decoded(index: Any) -> np.ndarray:
    """Keys as FAISS decodes them, in the space of the queries after all transforms."""
    inner = faiss.downcast_index(index)
    while isinstance(inner, (faiss.IndexPreTransform, faiss.IndexRefine)):
        nested = inner.index if isinstance(inner, faiss.IndexPreTransform) else inner.base_index
        inner = faiss.downcast_index(nested)
    if isinstance(inner, faiss.IndexIVF):
        inner.make_direct_map()
    return np.stack([inner.reconstruct(entry) for entry in range(inner.ntotal)])


@pytest.mark.parametrize("factory", PRECISE + FAST)
def test_distances_are_those_to_the_decoded_keys(factory: str) -> None:
    index, keys = made(factory)
    codes, queries = codes_of(index), keys[::150] + 0.3
    entries = torch.tensor([3, 999, 3, 500, 0])
    seen = codes.transformed(torch.from_numpy(queries)).numpy()
    expected = np.square(seen[:, None] - decoded(index.index)[entries.numpy()]).sum(2)
    np.testing.assert_allclose(adc(codes, queries, entries), expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factory", PRECISE)
@pytest.mark.parametrize("parts", [1, 3])
def test_distances_are_those_of_a_search_through_all_lists(factory: str, parts: int) -> None:
    index, keys = made(factory, parts)
    queries = keys[::150] + 0.3
    distances, ids = index.search(queries, len(keys), nprobe=100)
    found = adc(codes_of(index), queries, torch.arange(len(keys)))
    np.testing.assert_allclose(np.take_along_axis(found, ids, 1), distances, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("factory", OTHERS)
def test_other_indexes_have_no_such_codes(factory: str) -> None:
    assert stored_codes(made(factory)[0]) is None


def test_a_byte_of_two_codes_adds_both(rng: np.random.Generator = np.random.default_rng(0)) -> None:
    tables = rng.normal(size=(6, 16)).astype(np.float32)
    both = byte_tables(tables)
    assert both.shape == (3, 256)
    assert both[1, 16 * 7 + 4] == tables[2, 4] + tables[3, 7]


def test_codes_of_no_entries_have_no_distances() -> None:
    index, keys = made("IVF4,PQ4np")
    assert adc(codes_of(index), keys[:2], torch.empty(0, dtype=torch.long)).shape == (2, 0)
