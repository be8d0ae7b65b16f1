"""What is computed, built, tuned and explained on a GPU is what the CPU computes, builds, tunes and explains."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, GERMAN, TinyFamily
from tiny_stores import build_store, clumpy_keys, corpus_pairs, write_store

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain
from lightning_knnmt.evaluation.tuning import Grid, likelihoods, tune
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.faiss_index import FaissIndex, read_index
from lightning_knnmt.index.gpu import adder, find_gpus, has_gpu_version
from lightning_knnmt.index.layers import find_ivf, innermost
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.memory import DatastoreMemory

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = "cuda"
PAIRS = corpus_pairs(40)
VALIDATION = [Pair(f"7{pair.src}", pair.tgt) for pair in corpus_pairs(9, seed=3)]
DECODING = Decoding(beams=1, batch_size=4, max_new_tokens=12)
FP16 = {"rtol": 3e-3, "atol": 3e-3}

with_faiss = pytest.mark.skipif(faiss.get_num_gpus() == 0, reason="needs a GPU build of FAISS (requirements-gpu.txt)")
ENTRIES, KEY_SIZE, K = 6000, 32, 10
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
QUERIES = clumpy_keys(100, KEY_SIZE, seed=1)[0].astype(np.float32)
SQUARED = ((QUERIES[:, None].astype(np.float64) - KEYS[None].astype(np.float64)) ** 2).sum(2)
NEAREST = SQUARED.argsort(axis=1, kind="stable")[:, :K]
SEARCHED = ["IVF16,Flat", "IVF16,SQ8", "IVF16,PQ8", "OPQ8,IVF16,PQ8", "IVF16_HNSW32,PQ8"]
FILLED = [*SEARCHED, "IVF16,PQ16x4fs,Refine(SQfp16)", "OPQ8,IVF16,PQ8x4fs", "IVF16,RaBitQfs2"]


@pytest.fixture(scope="module")
def on_cpu(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def on_gpu(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device=GPU)


@pytest.fixture(scope="module")
def store(on_cpu: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    """Built on the CPU, with an index."""
    with build_store(on_cpu, tmp_path_factory.mktemp("gpu") / "store", PAIRS, 10) as store:
        build_index(store, IndexConfig("IVF4,Flat", train_points=160))
        yield store


@pytest.mark.parametrize("key_type", ["decoder_output", "ffn_input"])
def test_keys_on_the_gpu_are_close_to_those_on_the_cpu(tiny_folder: Path, tiny_family: TinyFamily, key_type):
    cpu = load_model(str(tiny_folder), key_type=key_type, device="cpu", **tiny_family.languages)
    gpu = load_model(str(tiny_folder), key_type=key_type, **tiny_family.languages)
    assert gpu.device.type == "cuda"
    with torch.inference_mode():
        batch = cpu.batch(GERMAN, ENGLISH)
        keys = gpu.keys(gpu.batch(GERMAN, ENGLISH)).cpu()
        torch.testing.assert_close(keys[batch.target_mask], cpu.keys(batch)[batch.target_mask], rtol=1e-3, atol=1e-3)
    assert gpu.generate(gpu.batch(GERMAN)).device.type == "cuda"


def test_a_datastore_and_index_built_on_the_gpu_are_those_of_the_cpu(
    on_cpu: KeyedModel, on_gpu: KeyedModel, store: Datastore, tmp_path: Path
) -> None:
    assert on_gpu.device.type == GPU
    with build_store(on_gpu, tmp_path / "store", PAIRS, 10) as other:
        other.check(on_cpu)
        assert len(other.manifest.shards) == len(store.manifest.shards) > 1
        assert other.values.tolist() == store.values.tolist()
        assert [other.context(entry) for entry in range(len(other))] == list(map(store.context, range(len(store))))
        keys = [np.concatenate(list(either.key_chunks())).astype(np.float32) for either in (other, store)]
        np.testing.assert_allclose(keys[0], keys[1], **FP16)
        assert build_index(other, IndexConfig("IVF4,Flat", train_points=160)).nlist == 4
        queries = torch.from_numpy(store.sample_keys(20)).float() + 0.01
        found = [
            DatastoreMemory(either, open_index(either)).search(queries, k=5, nprobe=4) for either in (other, store)
        ]
    torch.testing.assert_close(found[0].distances, found[1].distances, rtol=1e-2, atol=1e-2)


def test_likelihoods_on_the_gpu_are_those_on_the_cpu_and_tuning_ends(
    on_cpu: KeyedModel, on_gpu: KeyedModel, store: Datastore
) -> None:
    grid = Grid(k=[1, 3, 8], lambda_=[0.25, 0.8], temperature=[5.0, 20.0], nprobe=[2, 4], finalists=2)
    memory, mixture = DatastoreMemory(store, open_index(store)), MixtureConfig.of()
    found = [likelihoods(backbone, memory, mixture, VALIDATION, grid) for backbone in (on_cpu, on_gpu)]
    for cpu, gpu in zip(*(candidates for candidates, *_ in found), strict=True):
        assert gpu.options == cpu.options
        assert gpu.log_likelihood == pytest.approx(cpu.log_likelihood, abs=5e-3)
    tuned = tune(on_gpu, memory, mixture, VALIDATION, grid, DECODING)
    assert tuned.best.settings in [candidate.mixture.settings for candidate in found[0][0]]
    assert tuned.plain_log_likelihood == pytest.approx(found[0][1], abs=5e-3)
    assert tuned.plain_log_likelihood == pytest.approx(found[1][1], abs=1e-4)


def test_explanations_on_the_gpu_are_those_on_the_cpu(on_cpu: KeyedModel, on_gpu: KeyedModel, store: Datastore) -> None:
    settings = KnnSettings(k=4, lambda_=0.6, temperature=8.0, nprobe=4)
    for source in [pair.src for pair in VALIDATION[:3]]:
        memory = DatastoreMemory(store, open_index(store))
        cpu, gpu = (explain(settings.open(backbone, memory), source, DECODING) for backbone in (on_cpu, on_gpu))
        assert gpu.text == cpu.text and len(cpu.tokens) > 2
        for expected, found in zip(cpu.tokens, gpu.tokens, strict=True):
            assert found.token == expected.token
            assert found.probability == pytest.approx(expected.probability, abs=1e-3)
            assert found.model_probability == pytest.approx(expected.model_probability, abs=1e-3)
            distances = [neighbor.distance for neighbor in expected.neighbors]
            assert [neighbor.distance for neighbor in found.neighbors] == pytest.approx(distances, rel=1e-2, abs=1e-2)


@pytest.fixture(scope="module")
def clumps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with write_store(tmp_path_factory.mktemp("clumps") / "store", KEYS, VALUES, [2500, 1, 1999, 1500]) as store:
        yield store


def built(store: Datastore, factory: str, device: Any, layout: Any = "whole") -> tuple[str, IndexReport]:
    """The name and report of an index, which is built once."""
    name = "".join(letter if letter.isalnum() else "_" for letter in f"{factory}_{device}_{layout}")
    config = IndexConfig(factory, name=name, device=device, layout=layout, part_entries=2500, chunk=900)
    return name, build_index(store, config)


def overlap(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.mean([len(set(a) & set(b)) / K for a, b in zip(found, expected, strict=True)]))


@with_faiss
@pytest.mark.parametrize("factory", ["Flat", *FILLED])
def test_an_index_built_on_gpus_is_as_good_as_one_built_on_the_cpu(clumps: Datastore, factory: str) -> None:
    recalls, reports = [], []
    for device in ("cpu", "gpu"):
        name, report = built(clumps, factory, device)
        index = open_index(clumps, name)
        distances, ids = index.search(QUERIES, K, nprobe=16)
        assert (ids >= 0).all() and (ids < ENTRIES).all()
        recalls.append(overlap(ids, NEAREST))
        reports.append(report)
        if factory in ("Flat", "IVF16,Flat"):
            np.testing.assert_array_equal(ids, NEAREST)
            np.testing.assert_allclose(distances, np.take_along_axis(SQUARED, ids, 1), rtol=1e-4)
        if (ivf := find_ivf(index.index)) is not None:
            assert ivf.clustering_index is None
            ids = np.concatenate([faiss.rev_swig_ptr(ivf.invlists.get_ids(n), s) for n, s in _lists(ivf)])
            assert sorted(ids.tolist()) == list(range(ENTRIES))
        if hasattr(codes := innermost(index.index), "pq"):
            assert codes.pq.assign_index is None
    assert recalls[1] == pytest.approx(recalls[0], abs=0.05)
    if reports[0].imbalance_factor is not None:
        assert reports[1].imbalance_factor == pytest.approx(reports[0].imbalance_factor, rel=0.1)
        assert reports[1].homogeneity == pytest.approx(reports[0].homogeneity, abs=0.05)


def _lists(ivf: Any) -> list[tuple[int, int]]:
    sizes = [(number, ivf.invlists.list_size(number)) for number in range(ivf.nlist)]
    return [(number, size) for number, size in sizes if size]


@with_faiss
@pytest.mark.parametrize("factory", FILLED)
def test_keys_added_on_gpus_are_where_the_cpu_puts_them(clumps: Datastore, factory: str) -> None:
    name, _ = built(clumps, factory, "cpu")
    indexes = []
    for gpus in (None, find_gpus("gpu")):
        index = read_index(clumps.folder / f"{name}.faiss")
        index.reset()
        with adder(index, gpus) as add:
            for keys in np.split(KEYS.astype(np.float32), [2500, 2507]):
                add(keys)
        indexes.append(FaissIndex(index))
    cpu, gpu = indexes
    lists = [index.list_of_entries() for index in indexes]
    assert (lists[0] == lists[1]).mean() > (0.95 if "HNSW" in factory else 0.999)  # a graph may miss the nearest list
    assert len(gpu) == len(cpu) == ENTRIES
    assert overlap(gpu.search(QUERIES, K, 16)[1], cpu.search(QUERIES, K, 16)[1]) > 0.98


@with_faiss
def test_parts_filled_on_gpus_merge_into_what_one_pass_writes(clumps: Datastore) -> None:
    name, _ = built(clumps, "IVF16,Flat", "gpu")
    whole = open_index(clumps, name)
    config = IndexConfig("IVF16,Flat", name="merged", device="gpu", part_entries=2500, chunk=900)
    build_index(clumps, config)
    merged = open_index(clumps, "merged")
    np.testing.assert_array_equal(merged.search(QUERIES, K, 16)[1], whole.search(QUERIES, K, 16)[1])


@with_faiss
@pytest.mark.parametrize("layout", ["whole", "shards"])
@pytest.mark.parametrize("factory", ["Flat", *SEARCHED])
def test_a_search_on_gpus_finds_what_one_on_the_cpu_does(clumps: Datastore, factory: str, layout: Any) -> None:
    name, _ = built(clumps, factory, "cpu", layout)
    cpu, gpu = (open_index(clumps, name, device=device) for device in ("cpu", "gpu"))
    assert has_gpu_version(gpu.index) and gpu.device.startswith("gpu 0")
    for nprobe in (4, 1, 16):
        (expected, ids), (distances, found) = (index.search(QUERIES, K, nprobe) for index in (cpu, gpu))
        # fp16 tables of PQ, and graphs that miss lists
        assert overlap(found, ids) > (0.9 if "HNSW" in factory else 0.97)
        np.testing.assert_allclose(np.median(distances, 0), np.median(expected, 0), rtol=1e-2)
        if factory in ("Flat", "IVF16,Flat"):
            np.testing.assert_array_equal(found, ids)
    with pytest.raises(ValueError, match="k is 2049, expected 2048 or less on GPUs"):
        gpu.search(QUERIES, 2049)


@with_faiss
def test_fewer_entries_than_neighbors_are_filled_up_on_gpus_as_on_the_cpu(clumps: Datastore) -> None:
    name, _ = built(clumps, "IVF16,Flat", "cpu")
    cpu, gpu = (open_index(clumps, name, device=device) for device in ("cpu", "gpu"))
    (expected, ids), (distances, found) = (index.search(QUERIES, 1500, nprobe=1) for index in (cpu, gpu))
    assert (ids < 0).any()
    np.testing.assert_array_equal(found < 0, ids < 0)
    np.testing.assert_array_equal(np.isinf(distances), np.isinf(expected))


@with_faiss
def test_translations_with_an_index_on_gpus_are_those_with_one_on_the_cpu(on_cpu: KeyedModel, store: Datastore) -> None:
    settings = KnnSettings(k=4, lambda_=0.6, temperature=8.0, nprobe=4)
    sources = [pair.src for pair in VALIDATION]
    texts = [
        Translator(on_cpu, settings.open(on_cpu, DatastoreMemory(store, index)), DECODING).translate(sources).texts
        for index in (open_index(store, device=device) for device in ("cpu", "gpu"))
    ]
    assert texts[0] == texts[1]
