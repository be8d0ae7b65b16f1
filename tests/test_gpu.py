"""What is computed, built, tuned and explained on a GPU is what the CPU computes, builds, tunes and explains."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, GERMAN, TinyFamily
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding
from lightning_knnmt.evaluation.tuning import Grid, likelihoods, reference_states, tune
from lightning_knnmt.explanation import explain
from lightning_knnmt.index import IndexConfig, build_index, open_index
from lightning_knnmt.retrieval import DatastoreRetriever
from lightning_knnmt.search import KnnSearch, KnnSettings

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

GPU = "cuda"
PAIRS = corpus_pairs(40)
VALIDATION = [Pair(f"7{pair.src}", pair.tgt) for pair in corpus_pairs(9, seed=3)]
DECODING = Decoding(beams=1, batch_size=4, max_new_tokens=12)
FP16 = {"rtol": 3e-3, "atol": 3e-3}


@pytest.fixture(scope="module")
def on_cpu(marian_folder: Path) -> Backbone:
    return Backbone(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def on_gpu(marian_folder: Path) -> Backbone:
    return Backbone(str(marian_folder), device=GPU)


@pytest.fixture(scope="module")
def store(on_cpu: Backbone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    """Built on the CPU, with an index."""
    with build_store(on_cpu, tmp_path_factory.mktemp("gpu") / "store", PAIRS, 100) as store:
        build_index(store, IndexConfig("IVF4,Flat", train_points=160))
        yield store


@pytest.mark.parametrize("key_type", ["decoder_output", "ffn_input"])
def test_keys_on_the_gpu_are_close_to_those_on_the_cpu(tiny_folder: Path, tiny_family: TinyFamily, key_type):
    cpu = Backbone(str(tiny_folder), key_type, device="cpu", **tiny_family.languages)
    gpu = Backbone(str(tiny_folder), key_type, **tiny_family.languages)
    assert gpu.device.type == "cuda"
    with torch.inference_mode():
        batch = cpu.batch(GERMAN, ENGLISH)
        keys = gpu.keys(gpu.batch(GERMAN, ENGLISH)).cpu()
        torch.testing.assert_close(keys[batch.target_mask], cpu.keys(batch)[batch.target_mask], rtol=1e-3, atol=1e-3)
    assert gpu.generate(gpu.batch(GERMAN)).device.type == "cuda"


def test_a_datastore_and_index_built_on_the_gpu_are_those_of_the_cpu(
    on_cpu: Backbone, on_gpu: Backbone, store: Datastore, tmp_path: Path
) -> None:
    assert on_gpu.device.type == GPU
    with build_store(on_gpu, tmp_path / "store", PAIRS, 100) as other:
        other.check(on_cpu)
        assert len(other.manifest.shards) == len(store.manifest.shards) > 1
        assert other.values.tolist() == store.values.tolist()
        assert [other.context(entry) for entry in range(len(other))] == list(map(store.context, range(len(store))))
        keys = [np.concatenate(list(either.key_chunks())).astype(np.float32) for either in (other, store)]
        np.testing.assert_allclose(keys[0], keys[1], **FP16)
        assert build_index(other, IndexConfig("IVF4,Flat", train_points=160)).nlist == 4
        queries = torch.from_numpy(store.sample_keys(20)).float() + 0.01
        found = [
            DatastoreRetriever(either, open_index(either), k=5, nprobe=4).retrieve(queries) for either in (other, store)
        ]
    torch.testing.assert_close(found[0].distances, found[1].distances, rtol=1e-2, atol=1e-2)


def test_likelihoods_on_the_gpu_are_those_on_the_cpu_and_tuning_ends(
    on_cpu: Backbone, on_gpu: Backbone, store: Datastore
) -> None:
    grid = Grid(k=[1, 3, 8], lambda_=[0.25, 0.8], temperature=[5.0, 20.0], nprobe=[2, 4], finalists=2)
    candidates = []
    for backbone in (on_cpu, on_gpu):
        states = reference_states(backbone, VALIDATION, grid.max_tokens)
        candidates.append(likelihoods(KnnSearch(backbone, store), states, grid))
    for cpu, gpu in zip(*candidates, strict=True):
        assert gpu == replace(cpu, log_likelihood=pytest.approx(cpu.log_likelihood, abs=5e-3))
    tuned = tune(KnnSearch(on_gpu, store), VALIDATION, grid, DECODING)
    assert tuned.best in [candidate.settings for candidate in candidates[0]]
    assert tuned.plain_log_likelihood == pytest.approx(float(states.log_probs.mean()), abs=1e-4)


def test_explanations_on_the_gpu_are_those_on_the_cpu(on_cpu: Backbone, on_gpu: Backbone, store: Datastore) -> None:
    settings = KnnSettings(k=4, lambda_=0.6, temperature=8.0, nprobe=4)
    for source in [pair.src for pair in VALIDATION[:3]]:
        cpu, gpu = (explain(KnnSearch(backbone, store), settings, DECODING, source) for backbone in (on_cpu, on_gpu))
        assert gpu.text == cpu.text and len(cpu.tokens) > 2
        for expected, found in zip(cpu.tokens, gpu.tokens, strict=True):
            assert found.token == expected.token
            assert found.probability == pytest.approx(expected.probability, abs=1e-3)
            assert found.model_probability == pytest.approx(expected.model_probability, abs=1e-3)
            distances = [neighbor.distance for neighbor in expected.neighbors]
            assert [neighbor.distance for neighbor in found.neighbors] == pytest.approx(distances, rel=1e-2, abs=1e-2)
