"""Inner products and cosines: search, lists, re-scoring and the kNN distribution against numpy."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.evaluation.tuning import default_temperatures
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.faiss_index import FaissIndex, find_ivf
from lightning_knnmt.index.opening import load_index, open_index, read_report
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.index.splitting import split_centroids
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.probability import knn_log_weights
from lightning_knnmt.memory import DatastoreMemory, open_memory
from lightning_knnmt.metric import Metric, distances
from lightning_knnmt.storage.errors import DatastoreError

ENTRIES, KEY_SIZE, K = 900, 16, 10
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
KEYS += np.float16(1.5)  # a direction that all share
QUERIES = clumpy_keys(33, KEY_SIZE, seed=1)[0].astype(np.float32) + 1.5
METRICS: tuple[Metric, ...] = ("l2", "ip", "cos")


def exact(metric: Metric) -> NDArray[np.float64]:
    """Distances by numpy, shape (R, N)."""
    queries, keys = QUERIES.astype(np.float64), KEYS.astype(np.float64)
    if metric == "l2":
        return ((queries[:, None] - keys[None]) ** 2).sum(2)
    products = queries @ keys.T
    if metric == "cos":
        products /= np.linalg.norm(queries, axis=1)[:, None] * np.linalg.norm(keys, axis=1)
    return -products


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with write_store(tmp_path_factory.mktemp("metric") / "store", KEYS, VALUES, [500, 1, 0, 399]) as store:
        for metric in METRICS:
            build_index(store, IndexConfig("Flat", metric=metric, name=f"{metric}-flat"))
            build_index(store, IndexConfig("IVF8,PQ4x4fs", metric=metric, name=f"{metric}-codes"))
            parts = IndexConfig("IVF8,Flat", metric, name=f"{metric}-parts", layout="shards", part_entries=300)
            build_index(store, parts)
        for metric, spherical in (("ip", True), ("ip", False), ("cos", True), ("cos", False)):
            name = f"{metric}-{'unit' if spherical else 'any'}"
            build_index(store, IndexConfig("IVF16,Flat", metric, spherical, name=name))  # type: ignore[arg-type]
        yield store


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("kind", ["flat", "parts", "codes"])
def test_search_is_brute_force_by_the_index_s_metric(store: Datastore, metric: Metric, kind: str) -> None:
    memory = DatastoreMemory(store, open_index(store, f"{metric}-{kind}"), read_report(store, f"{metric}-{kind}"))
    assert memory.metric == metric
    found = memory.search(torch.from_numpy(QUERIES), K, nprobe=8, rescore=ENTRIES if kind == "codes" else 0)
    wanted = exact(metric)
    np.testing.assert_allclose(found.distances.numpy(), np.sort(wanted, 1)[:, :K], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(np.take_along_axis(wanted, found.ids.numpy(), 1), found.distances, rtol=1e-4, atol=1e-4)
    assert (found.distances.diff(dim=1) >= 0).all()
    assert (found.values.numpy() == VALUES[found.ids.numpy()]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_a_memory_in_ram_is_brute_force_too(metric: Metric) -> None:
    memory = RamMemory(torch.from_numpy(KEYS), torch.from_numpy(VALUES), [], [ENTRIES], metric=metric)
    found = memory.search(torch.from_numpy(QUERIES), K)
    np.testing.assert_allclose(found.distances.numpy(), np.sort(exact(metric), 1)[:, :K], rtol=1e-4, atol=1e-4)
    every = distances(torch.from_numpy(QUERIES), torch.from_numpy(KEYS), metric)
    np.testing.assert_allclose(every.numpy(), exact(metric), rtol=1e-3, atol=1e-3)


def test_the_metrics_find_different_neighbors(store: Datastore) -> None:
    nearest = [exact(metric).argsort(1)[:, :K].tolist() for metric in METRICS]
    assert nearest[0] != nearest[1] != nearest[2] != nearest[0]


def test_the_knn_distribution_of_similarities_is_their_softmax(store: Datastore) -> None:
    found = DatastoreMemory(store, open_index(store, "ip-flat")).search(torch.from_numpy(QUERIES), K)
    similarities = -np.sort(exact("ip"), 1)[:, :K] / 7.0
    shares = np.exp(similarities - similarities.max(1, keepdims=True))
    expected = shares / shares.sum(1, keepdims=True)
    np.testing.assert_allclose(knn_log_weights(found.distances, 7.0).exp().numpy(), expected, rtol=1e-3, atol=1e-6)
    assert FixedCombiner(0.5, 7.0).temperature == 7.0


@pytest.mark.parametrize("name", ["ip-unit", "ip-any", "cos-unit", "cos-any"])
def test_centroids_have_unit_norm_or_any_as_asked(store: Datastore, name: str) -> None:
    index = load_index(store, name)
    ivf = find_ivf(index.index)
    assert ivf is not None
    norms = np.linalg.norm(ivf.quantizer.reconstruct_n(0, 16), axis=1)
    assert np.allclose(norms, 1, atol=1e-5) == name.endswith("unit")
    lists = index.list_of_entries()
    keys = KEYS.astype(np.float32)
    if name.startswith("cos"):
        keys /= np.linalg.norm(keys, axis=1, keepdims=True)
    assert (lists == (keys @ ivf.quantizer.reconstruct_n(0, 16).T).argmax(1)).mean() > 0.99
    scanned = index.codes_scanned(QUERIES, 16)
    assert (scanned == ENTRIES).all()


def test_a_direction_that_all_keys_share_unbalances_inner_products_with_centroids_of_any_norm() -> None:
    rng = np.random.default_rng(0)
    keys = (rng.normal(size=(4000, 16)) + 4 * np.eye(16)[0]).astype(np.float32) * rng.uniform(1, 2, (4000, 1))
    factors: dict[tuple[str, bool | None], float] = {}
    with write_store(Path("store"), keys.astype(np.float16), np.arange(4000, dtype=np.int32) % 7) as store:
        for metric, spherical in (("l2", None), ("ip", True), ("ip", False)):
            config = IndexConfig("IVF32,Flat", metric, spherical, name=f"{metric}-{spherical}")  # type: ignore[arg-type]
            factors[metric, spherical] = build_index(store, config).imbalance_factor or 0.0
    assert factors["ip", False] > 3 * factors["ip", True] and factors["ip", False] > 3 * factors["l2", None]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_metric_is_part_of_what_an_index_is(store: Datastore) -> None:
    assert IndexReport.load(store.folder / "ip-any.json").metric == "ip"
    report = read_report(store, "ip-any")
    assert (report.metric, report.unit_centroids) == ("ip", False)
    again = report.config("ip-any")
    assert (again.metric, again.spherical) == ("ip", False)
    with pytest.raises(DatastoreError, match="metric ip against cos"):
        build_index(store, IndexConfig("IVF16,Flat", "cos", name="ip-unit"))
    with pytest.raises(DatastoreError, match="unit_centroids False against True"):
        build_index(store, IndexConfig("IVF16,Flat", "ip", name="ip-any"))


def test_another_metric_than_the_index_s_is_refused(store: Datastore) -> None:
    with pytest.raises(DatastoreError, match="metric is l2, expected ip, by which the index 'ip-unit'"):
        open_memory(store.folder, "ip-unit", metric="l2")
    with open_memory(store.folder, "ip-unit", metric="ip") as memory:
        assert memory.metric == "ip"
    cosine = FaissIndex(load_index(store, "ip-flat").index, metric="cos")
    with pytest.raises(DatastoreError, match="searched by metric cos, expected ip"):
        DatastoreMemory(store, cosine, read_report(store, "ip-flat"))
    with pytest.raises(ValueError, match=r"FAISS metric 1, expected METRIC_INNER_PRODUCT \(0\) for ip"):
        FaissIndex(load_index(store, "l2-flat").index, metric="ip")


def test_descriptions_from_before_there_were_metrics_are_of_squared_distances(store: Datastore) -> None:
    report = read_report(store, "l2-codes")
    old = {name: value for name, value in vars(report).items() if name not in ("metric", "unit_centroids")}
    assert type(report)(**old) == report


def test_centroids_are_asked_for_by_the_metric_that_has_them() -> None:
    with pytest.raises(ValueError, match="spherical is True, expected none with l2"):
        IndexConfig(spherical=True)
    with pytest.raises(ValueError, match="metric is 'dot', expected"):
        IndexConfig(metric="dot")  # type: ignore[arg-type]


def test_split_lists_follow_the_metric(store: Datastore) -> None:
    report = build_index(store, IndexConfig("IVF16,Flat", "cos", split_lists=0.5, name="split"))
    plain = read_report(store, "cos-unit")
    assert report.imbalance_factor < plain.imbalance_factor  # type: ignore[operator]
    sample = KEYS.astype(np.float32)
    assert split_centroids(sample, 16, 0.5).shape == (16, KEY_SIZE)


def test_temperatures_scale_with_the_lead_in_similarity() -> None:
    assert default_temperatures(torch.tensor([2.0, 4.0, 6.0]), 1.0) == [0.4, 0.8, 1.6, 3.2, 6.4, 13.0]
