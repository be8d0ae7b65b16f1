"""Splitting the longest lists evens an index, whatever the keys are."""

from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from tiny_stores import write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.balance import imbalance_factor
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.splitting import split_centroids
from lightning_knnmt.storage.errors import DatastoreError


def clumped_keys(seed: int = 0) -> np.ndarray:
    """Half of the keys in a tight clump, the others far out: k-means spends its centroids on these."""
    rng = np.random.default_rng(seed)
    return np.concatenate([0.1 * rng.normal(size=(3000, 8)), 5 * rng.normal(size=(3000, 8))]).astype(np.float32)


def sizes(keys: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """Brute force in float64."""
    distances = ((keys[:, None].astype(np.float64) - centroids[None]) ** 2).sum(2)
    return np.bincount(distances.argmin(1), minlength=len(centroids))


def factor(keys: np.ndarray, centroids: np.ndarray) -> float:
    counts = sizes(keys, centroids).astype(float)
    return len(counts) * (counts**2).sum() / counts.sum() ** 2


def test_clumped_keys_are_cut_into_more_even_lists() -> None:
    keys = clumped_keys()
    plain, split = (split_centroids(keys, 32, share) for share in (0.0, 0.5))
    assert factor(keys, plain) > 5
    assert factor(keys, split) < factor(keys, plain) / 2
    assert split.shape == plain.shape == (32, 8)


def test_no_share_is_plain_k_means() -> None:
    keys = clumped_keys()
    clustering = faiss.Kmeans(8, 32, niter=10, seed=1, min_points_per_centroid=1)
    clustering.train(keys)
    np.testing.assert_array_equal(split_centroids(keys, 32, 0.0), clustering.centroids)


def test_evenness_is_measured_as_elsewhere() -> None:
    keys = clumped_keys()
    centroids = split_centroids(keys, 16, 0.25)
    measured = imbalance_factor(torch.from_numpy(sizes(keys, centroids)))
    assert factor(keys, centroids) == pytest.approx(measured, rel=1e-5)


def test_keys_that_are_alike_leave_lists_empty_instead_of_failing() -> None:
    keys = np.repeat(np.eye(4, dtype=np.float32), 50, axis=0)
    centroids = split_centroids(keys, 8, 0.5)
    assert centroids.shape == (8, 4)
    assert np.isfinite(centroids).all()
    assert sizes(keys, centroids).sum() == 200


@pytest.mark.parametrize(("nlist", "share", "message"), [(32, 1.0, "share is 1.0"), (300, 0.1, "only 200 keys")])
def test_what_cannot_be_is_refused(nlist: int, share: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_centroids(np.random.default_rng(0).normal(size=(200, 4)).astype(np.float32), nlist, share)


FACTORIES = ["IVF32,Flat", "OPQ4,IVF32,PQ4x4fs", "PCA4,IVF32,Flat", "OPQ4,IVF32,PQ4,Refine(SQfp16)", "IVF32_HNSW8,SQ8"]


def found_themselves(store: Datastore, name: str) -> float:
    """Share of some stored keys that are among their own ten nearest."""
    index = open_index(store, name)
    rows = np.arange(0, len(store), 100)
    return float((index.search(store.sample_keys(len(store))[rows], 10, nprobe=32)[1] == rows[:, None]).any(1).mean())


@pytest.mark.parametrize("factory", FACTORIES)
def test_an_index_is_built_with_split_lists(factory: str, tmp_path: Path) -> None:
    keys = clumped_keys().astype(np.float16)
    with write_store(tmp_path / "store", keys, np.arange(len(keys), dtype=np.int32) % 9) as store:
        plain = build_index(store, IndexConfig(factory, name="plain"))
        split = build_index(store, IndexConfig(factory, name="split", split_lists=0.5))
        assert build_index(store, IndexConfig(factory, name="split", split_lists=0.5)) == split
        with pytest.raises(DatastoreError, match=r"split_lists 0\.5 against 0\.0"):
            build_index(store, IndexConfig(factory, name="split"))
        assert found_themselves(store, "split") > found_themselves(store, "plain") - 0.05
    assert (plain.split_lists, split.split_lists) == (0.0, 0.5)
    assert split.imbalance_factor is not None and plain.imbalance_factor is not None
    assert split.imbalance_factor < plain.imbalance_factor


def test_splitting_needs_lists(tmp_path: Path) -> None:
    keys = clumped_keys().astype(np.float16)
    with (
        write_store(tmp_path / "store", keys, np.zeros(len(keys), np.int32)) as store,
        pytest.raises(ValueError, match="has no inverted lists; expected a factory with IVF"),
    ):
        build_index(store, IndexConfig("Flat", split_lists=0.1))
    with pytest.raises(ValueError, match="split_lists is 1"):
        IndexConfig(split_lists=1.0)
