"""What trains, fills and searches indexes on GPUs, run on the CPU; only functions of FAISS's GPU build are replaced.

`OnCpu` makes the same objects in memory: real flat indexes assign points, and real copies are filled and searched.
"""

import gc
import logging
import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import IndexBuild, build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.index import gpu
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.factory import make_index, refusing
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.gpu import Gpus, adder, assigning, find_gpus, has_gpu_version
from lightning_knnmt.index.layers import find_ivf, innermost
from lightning_knnmt.index.opening import open_index, open_parts
from lightning_knnmt.index.splitting import give_centroids
from lightning_knnmt.index.training import Training
from lightning_knnmt.storage.ranks import Ranks

ENTRIES, KEY_SIZE, K = 900, 16, 10
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
SAMPLE = KEYS.astype(np.float32)
QUERIES = clumpy_keys(33, KEY_SIZE, seed=1)[0].astype(np.float32)

COPIED = ["IVF8,Flat", "IVF8,SQ8", "IVF8,SQfp16", "IVF8,PQ4", "OPQ4,IVF8,PQ4", "PCA12,IVF8,SQ8", "IVF8_HNSW32,SQ8"]
ASSIGNED = [
    "IVF8,PQ8x4fs",
    "IVF8,PQ8x4fs,Refine(SQfp16)",
    "OPQ8,IVF8,PQ8x4fs,Refine(SQfp16)",
    "IVF8,RaBitQ2",
    "IVF8,RaBitQfs2",
    "IVF8_HNSW32,PQ8x4fs,Refine(SQfp16)",
]
WITHOUT_LISTS = ["Flat", "HNSW8", "PQ4", "SQ8"]


@dataclass(frozen=True)
class OnCpu(Gpus):
    """GPUs whose memory is the CPU's; it counts what is asked of them.

    Attributes:
        flats: Flat indexes that were made.
        copies: Entries and coarse quantizer of each index that was copied.
        fetched: Entries of each index that was fetched.
    """

    numbers: tuple[int, ...] = (0, 1)
    flats: list[faiss.Index] = field(default_factory=list, compare=False)
    copies: list[tuple[int, Any]] = field(default_factory=list, compare=False)
    fetched: list[int] = field(default_factory=list, compare=False)

    def fetch(self, copy: faiss.Index) -> faiss.Index:
        self.fetched.append(copy.ntotal)
        return faiss.clone_index(copy)

    def set_nprobe(self, copy: faiss.Index, nprobe: int) -> None:
        faiss.ParameterSpace().set_index_parameter(copy, "nprobe", nprobe)

    def _copied(self, index: faiss.Index, shard: bool) -> faiss.Index:
        copy = faiss.clone_index(index)
        if shard:
            ivf = find_ivf(index)
            quantizer = None if ivf is None else type(faiss.downcast_index(ivf.quantizer))
            self.copies.append((index.ntotal, quantizer))
        else:
            self.flats.append(copy)
        return copy


class Small(OnCpu):
    """GPUs that refuse every index whose entries they are to hold."""

    def _copied(self, index: faiss.Index, shard: bool) -> faiss.Index:
        if shard:
            raise RuntimeError("number of sub-quantizers not supported")
        return super()._copied(index, shard)


@lru_cache
def trained_here(factory: str) -> bytes:
    """What training on the CPU alone gives."""
    return content(trained(factory, None))


def copy_of(factory: str) -> faiss.Index:
    return faiss.deserialize_index(np.frombuffer(trained_here(factory), np.uint8))


def trained(factory: str, gpus: Gpus | None, split: float = 0.0) -> faiss.Index:
    index = make_index(factory, KEY_SIZE)
    with assigning(index, gpus):
        if split:
            give_centroids(index, SAMPLE, split, 1, faiss.IndexFlatL2 if gpus is None else gpus.flat)
        index.train(SAMPLE)
    return index


def content(index: faiss.Index) -> bytes:
    return faiss.serialize_index(index).tobytes()


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> OnCpu:
    """Two GPUs, which builds and searches find unless they are told to take the CPU."""
    gpus = OnCpu()
    for module in ("building.index", "index.opening"):
        monkeypatch.setattr(f"lightning_knnmt.{module}.find_gpus", lambda device: None if device == "cpu" else gpus)
    return gpus


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Datastore]:
    with write_store(tmp_path / "store", KEYS, VALUES, [200, 150, 1, 0, 249, 300]) as store:
        yield store


@pytest.mark.parametrize("factory", [*COPIED, *ASSIGNED, *WITHOUT_LISTS])
def test_training_that_assigns_elsewhere_gives_the_same_bytes_and_leaves_nothing_attached(factory: str) -> None:
    gpus = OnCpu()
    index = trained(factory, gpus)
    assert content(index) == trained_here(factory)
    ivf, codes, outer = find_ivf(index), innermost(index), faiss.downcast_index(index)
    if isinstance(outer, faiss.IndexRefine):
        outer = faiss.downcast_index(outer.base_index)
    sizes = []
    if isinstance(outer, faiss.IndexPreTransform):
        transform = faiss.downcast_VectorTransform(outer.chain.at(0))
        if isinstance(transform, faiss.OPQMatrix):
            sizes.append(KEY_SIZE // transform.M)
            assert transform.pq is None
    if ivf is not None:
        sizes.append(ivf.d)
        assert ivf.clustering_index is None
    if hasattr(codes, "pq"):
        sizes.append(codes.pq.dsub)
        assert codes.pq.assign_index is None
    assert [flat.d for flat in gpus.flats] == sizes
    assert all(flat.thisown for flat in gpus.flats)
    assert all(flat.ntotal > 0 for flat in gpus.flats)  # the last centroids that they were given


def test_an_error_of_training_leaves_nothing_attached() -> None:
    gpus = OnCpu()
    index = make_index("OPQ4,IVF8,PQ4", KEY_SIZE)
    with pytest.raises(RuntimeError, match="should be at least as large"), assigning(index, gpus):
        index.train(SAMPLE[:100])
    assert find_ivf(index).clustering_index is None
    assert innermost(index).pq.assign_index is None
    assert len(gpus.flats) == 3 and all(flat.thisown for flat in gpus.flats)


def test_python_owns_again_what_was_lent(monkeypatch: pytest.MonkeyPatch) -> None:
    lent, real = [], gpu._lent

    @contextmanager
    def spy(holder: Any, name: str, what: Any) -> Iterator[None]:
        with real(holder, name, what):
            assert not what.thisown
            lent.append((type(what), name, what))
            yield

    monkeypatch.setattr(gpu, "_lent", spy)
    trained("OPQ4,IVF8,PQ8x4fs", OnCpu())
    with adder(copy_of("OPQ4,IVF8,PQ8x4fs"), OnCpu()) as add:
        add(SAMPLE)
    OnCpu().copy(copy_of("IVF8_HNSW32,SQ8"))
    flat, codes, exact = faiss.IndexFlatL2, faiss.ProductQuantizer, faiss.IndexRefine
    assert [(kind, name) for kind, name, _ in lent] == [
        (flat, "assign_index"), (codes, "pq"), (flat, "clustering_index"), (flat, "assign_index"),
        (exact, "quantizer"), (flat, "quantizer"),
    ]  # fmt: skip
    assert all(what.thisown for *_, what in lent)


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "PCA12,IVF8,PQ4"])
def test_long_lists_are_split_elsewhere_as_here(factory: str) -> None:
    gpus = OnCpu()
    assert content(trained(factory, gpus, split=0.5)) == content(trained(factory, None, split=0.5))
    # half of the centroids: k-means, and the lists to be split
    assert sum(flat.ntotal == 4 for flat in gpus.flats) == 2


def test_what_assigns_is_asked_and_not_ignored() -> None:
    class Wider(OnCpu):
        def flat(self, size: int) -> faiss.Index:
            return faiss.IndexFlatL2(size + 1)

    for factory in ("IVF8,Flat", "PQ4", "OPQ4,Flat"):
        with pytest.raises(RuntimeError, match="dimension"):
            trained(factory, Wider())


@pytest.mark.parametrize("factory", [*COPIED, *ASSIGNED, *WITHOUT_LISTS])
def test_adding_elsewhere_gives_the_same_bytes(factory: str) -> None:
    gpus = OnCpu()
    expected, index = copy_of(factory), copy_of(factory)
    with adder(index, gpus) as add:
        for keys in np.split(SAMPLE, [400, 407]):
            add(keys)
            expected.add(keys)
    assert index.ntotal == ENTRIES
    if "HNSW" in factory and "IVF" in factory:  # a graph may miss the nearest list
        assert np.mean(FaissIndex(index).list_of_entries() == FaissIndex(expected).list_of_entries()) > 0.95
        assert type(faiss.downcast_index(find_ivf(index).quantizer)) is faiss.IndexHNSWFlat
    else:
        assert content(index) == content(expected)
    assert (gpus.fetched == [400, 7, 493]) == (factory in COPIED)
    assert {entries for entries, _ in gpus.copies} <= {0}
    assert bool(gpus.flats) == (factory in ASSIGNED)
    faiss.downcast_index(index).search(QUERIES, K)  # with what it was given back


@pytest.mark.parametrize("factory", ["IVF8,SQ8", "IVF8,PQ8x4fs,Refine(SQfp16)"])
def test_adding_to_an_index_with_entries_copies_none_of_them(factory: str) -> None:
    gpus = OnCpu()
    expected, index = copy_of(factory), copy_of(factory)
    expected.add(SAMPLE)
    index.add(SAMPLE[:500])
    with adder(index, gpus) as add:
        add(SAMPLE[500:])
    assert content(index) == content(expected)
    assert not gpus.copies and [flat.ntotal for flat in gpus.flats] == [8]


def test_an_index_that_gpus_refuse_is_filled_on_the_cpu() -> None:
    expected, index = copy_of("IVF8,PQ4"), copy_of("IVF8,PQ4")
    expected.add(SAMPLE)
    gpus = Small()
    with adder(index, gpus) as add:
        add(SAMPLE)
    assert content(index) == content(expected) and len(gpus.flats) == 1
    with pytest.raises(ValueError, match=r"FAISS cannot have this index \(number of sub-quantizers not supported\)"):
        gpus.copy(index)


@pytest.mark.parametrize("layout", ["whole", "shards"])
@pytest.mark.parametrize("factory", ["Flat", "IVF8,SQ8", "PCA12,IVF8,PQ4", "IVF8,PQ8x4fs,Refine(SQfp16)"])
def test_a_build_on_gpus_writes_what_one_on_the_cpu_does(
    store: Datastore, gpus: OnCpu, factory: str, layout: Any
) -> None:
    files = []
    config = IndexConfig(
        factory, layout=layout, part_entries=250, chunk=100, split_lists=0.25 if "IVF" in factory else 0.0
    )
    for device in ("cpu", "auto"):
        assert not gpus.flats and not gpus.copies
        build_index(store, replace(config, name=device, device=device))
        paths = sorted(store.folder.glob(f"{device}.*faiss"))
        files.append({path.name.removeprefix(device): path.read_bytes() for path in paths})
    assert files[0] == files[1] and len(files[0]) == (1 if layout == "whole" else 4)
    assert bool(gpus.flats) == ("IVF" in factory)


def test_an_index_is_kept_wherever_it_was_built(store: Datastore, gpus: OnCpu) -> None:
    built = build_index(store, IndexConfig("IVF8,SQ8", device="cpu"))
    assert build_index(store, IndexConfig("IVF8,SQ8", device="gpu")) == built
    assert not gpus.flats
    built = build_index(store, IndexConfig("IVF8,SQ8", name="gpu", device="gpu"))
    assert gpus.flats
    assert build_index(store, IndexConfig("IVF8,SQ8", name="gpu", device="cpu")) == built


def test_an_index_is_kept_though_the_gpu_it_was_built_on_is_gone(store: Datastore) -> None:
    built = build_index(store, IndexConfig("IVF8,SQ8"))
    assert build_index(store, IndexConfig("IVF8,SQ8", device="gpu")) == built


def test_each_of_several_processes_adds_with_one_gpu(store: Datastore, gpus: OnCpu, monkeypatch) -> None:
    used = []
    monkeypatch.setattr(
        "lightning_knnmt.building.index.adder", lambda index, gpus: used.append(gpus) or adder(index, None)
    )
    config = IndexConfig("IVF8,SQ8")
    index = copy_of("IVF8,SQ8")
    for ranks in (Ranks(), Ranks(0, 3), Ranks(1, 3), Ranks(2, 3)):
        build = IndexBuild(store, config, Training.plan(store, config, ENTRIES), ranks)
        build.add(index, [KEYS[:5]], 5)
        build.add(index, [KEYS[5:7]], 2)
    assert [each.numbers for each in used[::2]] == [(0, 1), (0,), (1,), (0,)]
    assert all(one is two for one, two in zip(used[::2], used[1::2], strict=True))  # with the memory that it reserved


def test_what_training_reserves_on_gpus_is_free_once_keys_are_added(
    store: Datastore, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, alive = [], []  # for the check, for training, for adding

    def find(device: str) -> OnCpu:
        gpus = OnCpu()
        found.append(weakref.ref(gpus))
        return gpus

    def add(index: faiss.Index, gpus: OnCpu) -> Any:
        gc.collect()
        alive.append([each() is gpus for each in found])
        return adder(index, gpus)

    monkeypatch.setattr("lightning_knnmt.building.index.find_gpus", find)
    monkeypatch.setattr("lightning_knnmt.building.index.adder", add)
    build_index(store, IndexConfig("IVF8,SQ8", layout="shards", part_entries=250))
    assert alive == 3 * [[False, False, True]]


@pytest.mark.parametrize("mmap", [False, True])
@pytest.mark.parametrize("layout", ["whole", "shards"])
@pytest.mark.parametrize("factory", ["Flat", *COPIED])
def test_a_search_of_copies_is_that_of_the_index(
    store: Datastore, gpus: OnCpu, factory: str, layout: Any, mmap: bool
) -> None:
    build_index(store, IndexConfig(factory, layout=layout, part_entries=250, device="cpu"))
    here, there = (open_index(store, mmap=mmap, device=device) for device in ("cpu", "gpu"))
    assert (here.device, there.device) == ("cpu", "gpu 0, 1")
    assert sum(entries for entries, _ in gpus.copies) == ENTRIES
    assert all(quantizer is None or issubclass(quantizer, faiss.IndexFlat) for _, quantizer in gpus.copies)
    for part in here.parts:  # which keeps it out of the graph, as copies are
        if (ivf := find_ivf(part)) is not None and "HNSW" in factory:
            faiss.downcast_index(ivf.quantizer).hnsw.efSearch = 64
    for nprobe in (3, 1, 20):
        for ours, theirs in zip(here.search(QUERIES, K, nprobe), there.search(QUERIES, K, nprobe), strict=True):
            np.testing.assert_array_equal(ours, theirs)
    if "IVF" in factory:
        assert there.list_sizes().tolist() == here.list_sizes().tolist()
        assert there.codes_scanned(QUERIES, 3).tolist() == here.codes_scanned(QUERIES, 3).tolist()


def test_copies_are_what_is_searched(store: Datastore, gpus: OnCpu) -> None:
    build_index(store, IndexConfig("IVF8,Flat", device="cpu"))
    index = open_index(store, device="auto")
    expected = index.search(QUERIES, K)[1]
    index.index.reset()
    np.testing.assert_array_equal(index.search(QUERIES, K)[1], expected)


def test_each_process_searches_its_part_on_its_gpu(store: Datastore, gpus: OnCpu) -> None:
    build_index(store, IndexConfig("IVF8,SQ8", layout="shards", part_entries=250, device="cpu"))
    shares = [open_parts(store, rank, 3, device="gpu") for rank in range(3)]
    assert [share.device for share in shares] == ["gpu 0", "gpu 1", "gpu 0"]
    assert open_parts(store, 0, 3).device == "cpu"


def test_removed_entries_are_not_found_in_copies(store: Datastore, gpus: OnCpu) -> None:
    build_index(store, IndexConfig("IVF8,Flat", device="cpu"))
    store.removed = Removed.of(np.array([0, 500]), np.array([300, 550]))
    here, there = (open_index(store, device=device) for device in ("cpu", "gpu"))
    assert there.device == "gpu 0, 1"
    for ours, theirs in zip(here.search(QUERIES, K, 8), there.search(QUERIES, K, 8), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert not store.removed.covers(there.search(QUERIES, K, 8)[1]).any()


@pytest.mark.parametrize("layout", ["whole", "shards"])
def test_queries_near_more_removed_entries_than_gpus_select_are_answered_on_the_cpu(
    tmp_path: Path, gpus: OnCpu, monkeypatch: pytest.MonkeyPatch, layout: Any
) -> None:
    keys, values = clumpy_keys(3000, KEY_SIZE)
    nearest = ((keys.astype(np.float64) - QUERIES[0]) ** 2).sum(1).argsort()
    gone = np.sort(nearest[:2200])
    asked: list[tuple[bool, int, int]] = []  # whether of copies, R, K
    real = FaissIndex._search_in

    def spy(index: FaissIndex, parts: Any, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((parts is not index.parts, len(queries), k))
        return real(index, parts, queries, k)

    with write_store(tmp_path / "large", keys, values, [1100, 1900]) as store:
        build_index(store, IndexConfig("IVF8,Flat", layout=layout, part_entries=1900, device="cpu"))
        store.removed = Removed.of(gone, gone + 1)
        here, there = (open_index(store, device=device) for device in ("cpu", "gpu"))
    for nprobe, k in ((8, K), (8, 500), (6, K), (1, 2048)):
        expected = here.search(QUERIES, k, nprobe)
        asked.clear()
        with monkeypatch.context() as patched:
            patched.setattr(FaissIndex, "_search_in", spy)
            found = there.search(QUERIES, k, nprobe)
        for ours, theirs in zip(expected, found, strict=True):
            np.testing.assert_array_equal(theirs, ours)
        assert all(copies == (wanted <= 2048) for copies, _, wanted in asked)
        if nprobe == 8:
            rows = [rows for copies, rows, _ in asked if not copies]
            assert rows and (k > K or rows[0] < len(QUERIES))
            assert not np.isin(found[1], gone).any() and (found[1] >= 0).all()
    with pytest.raises(ValueError, match="k is 2049, expected 2048 or less on GPUs"):
        there.search(QUERIES, 2049)


@pytest.mark.parametrize("factory", ["IVF8,PQ8x4fs", "IVF8,RaBitQ2", "IVF8,Flat,Refine(SQfp16)", "HNSW8", "IVF8,PQ4x4"])
def test_a_family_that_gpus_do_not_have_is_refused_or_searched_on_the_cpu(
    store: Datastore, gpus: OnCpu, factory: str
) -> None:
    build_index(store, IndexConfig(factory, device="cpu"))
    message = r"on which FAISS cannot have this index \(.*Refine around it\); expected Flat, IVF1024,Flat, .*choose cpu"
    with pytest.raises(ValueError, match=message):
        open_index(store, device="gpu")
    assert open_index(store, device="auto").device == "cpu"


@pytest.mark.parametrize("layout", ["whole", "shards"])
def test_an_index_that_gpus_refuse_is_searched_on_the_cpu_unless_they_are_asked_for(
    store: Datastore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, layout: Any
) -> None:
    build_index(store, IndexConfig("IVF8,PQ4", layout=layout, part_entries=250, device="cpu"))
    monkeypatch.setattr("lightning_knnmt.index.opening.find_gpus", lambda device: None if device == "cpu" else Small())
    message = r"FAISS cannot have this index \(number of sub-quantizers not supported\)"
    with pytest.raises(ValueError, match=message):
        open_index(store, device="gpu")
    with caplog.at_level(logging.INFO):
        index = open_index(store, device="auto")
    assert index.device == "cpu" and re.search(f"searched on the CPU: .*{message}", caplog.text)
    for ours, theirs in zip(open_index(store).search(QUERIES, K), index.search(QUERIES, K), strict=True):
        np.testing.assert_array_equal(theirs, ours)


def test_more_neighbors_or_lists_than_gpus_select_are_refused(store: Datastore, gpus: OnCpu) -> None:
    build_index(store, IndexConfig("IVF8,SQ8", device="cpu"))
    here, there = (open_index(store, device=device) for device in ("cpu", "gpu"))
    np.testing.assert_array_equal(there.search(QUERIES, 2048, 3)[1], here.search(QUERIES, 3000, 3)[1][:, :2048])
    message = r"k is 2049, expected 2048 or less on GPUs .*; choose fewer, or search on the CPU"
    with pytest.raises(ValueError, match=message):
        there.search(QUERIES, 2049)
    quantizer = faiss.IndexFlatL2(2)
    lists = faiss.IndexIVFFlat(quantizer, 2, 3000)
    quantizer.add(np.random.default_rng(0).normal(size=(3000, 2)).astype(np.float32))
    lists.is_trained = True
    many = FaissIndex(lists)
    queries = np.zeros((1, 2), np.float32)
    many.search(queries, 1, nprobe=2999)
    many.search_on(gpus)
    many.search(queries, 1, nprobe=2048)
    with pytest.raises(ValueError, match="nprobe is 3000, expected 2048 or less on GPUs"):
        many.search(queries, 1, nprobe=5000)
    assert lists.nprobe == 2048


@pytest.mark.parametrize("layout", ["whole", "shards"])
def test_a_gpu_that_is_not_there_is_an_error_before_anything_is_written(store: Datastore, layout: Any) -> None:
    if find_gpus("auto") is not None:
        pytest.skip("FAISS has a GPU here")
    before = sorted(store.folder.iterdir())
    message = (
        rf"device is 'gpu', but FAISS {re.escape(faiss.__version__)} (is built for the CPU only|finds no CUDA device); "
        "expected a GPU build and a GPU: install requirements-gpu.txt in an environment without faiss-cpu"
    )
    with pytest.raises(ValueError, match=message):
        build_index(store, IndexConfig("IVF8,SQ8", layout=layout, device="gpu"))
    assert sorted(store.folder.iterdir()) == before
    build_index(store, IndexConfig("IVF8,SQ8", layout=layout))
    with pytest.raises(ValueError, match=message):
        open_index(store, device="gpu")
    assert open_index(store, device="auto").device == "cpu"


def test_a_device_of_another_name_is_refused() -> None:
    with pytest.raises(ValueError, match="device is 'cuda', expected one of auto, cpu, gpu"):
        IndexConfig(device="cuda")


def test_an_error_of_a_gpu_does_not_blame_the_factory() -> None:
    with (
        pytest.raises(ValueError, match=r"FAISS cannot train on 5 keys on a GPU \(.*out of memory.*choose device: cpu"),
        refusing("IVF8,SQ8", "train on 5 keys", "more"),
    ):
        raise RuntimeError("Error in faiss::gpu::StandardGpuResourcesImpl::allocMemory: out of memory")


@pytest.mark.parametrize("factory", [*COPIED, *ASSIGNED, *WITHOUT_LISTS])
def test_families_that_gpus_have_are_told_by_their_class(factory: str) -> None:
    assert has_gpu_version(make_index(factory, KEY_SIZE)) == (factory in [*COPIED, "Flat"])
