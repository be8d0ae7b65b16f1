"""Perplexity of mixtures against one computed row by row in numpy, and evaluate_lm.py from end to end."""

import json
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_causal import OTHER_PAGE, PAGE, make_gpt2, make_llama

import evaluate_lm
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.windows import Windows
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding
from lightning_knnmt.evaluation.perplexity import (
    Perplexity,
    check_documents_apart,
    perplexities,
    perplexity_table,
    tune_likelihood,
)
from lightning_knnmt.evaluation.tuning import Grid, Tune
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.loading import load_translator
from lightning_knnmt.memory import DatastoreMemory, open_memory

TEST = "Choose Save to print the document.\nThe printer asks for a password. Choose another printer."
VALIDATION = "The dialog is closed.\nChoose a name. The window that was used last is shown."
GRID = Grid(k=[1, 4], lambda_=[0.1, 0.4], temperature=[5.0, 50.0], nprobe=[1, 4], max_tokens=64)


def write_windows(path: Path, **documents: str) -> CorpusFile:
    lines = []
    for name, text in documents.items():
        for window in Windows(60, 40).cut(text, name):
            lines.append(json.dumps({"context": window.context, "text": window.text, "document": window.document}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return CorpusFile(path)


def windows_of(text: str) -> list[Pair]:
    return [window.pair for window in Windows(60, 40).cut(text)]


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, a datastore of two pages and two splits of windows."""
    root = tmp_path_factory.mktemp(request.param)
    {"gpt2": make_gpt2, "llama": make_llama}[request.param](root / "model")
    corpus = write_windows(root / "train.jsonl", printing=PAGE, passwords=OTHER_PAGE)
    write_windows(root / "test.jsonl", test=TEST)
    write_windows(root / "validation.jsonl", validation=VALIDATION)
    model = load_model(str(root / "model"), device="cpu")
    build_datastore(model, DatastoreConfig(root / "store", corpus, max_tokens=256))
    with Datastore(root / "store") as store:
        build_index(store, IndexConfig(factory="IVF4,Flat"))
    return root


@pytest.fixture
def model(folder: Path) -> KeyedModel:
    return load_model(str(folder / "model"), device="cpu")


@pytest.fixture
def memory(folder: Path) -> Iterator[DatastoreMemory]:
    with open_memory(folder / "store") as opened:
        yield opened


@torch.inference_mode()
def log_likelihood_by_hand(
    model: KeyedModel, memory: DatastoreMemory, text: str, k: int, lambda_: float, temperature: float
) -> float:
    """Mean log-probability of a text's tokens, one window, one token and one neighbor at a time."""
    keys = np.concatenate([chunk.astype(np.float64) for chunk in memory.datastore.key_chunks()])
    values = memory.datastore.values
    found = []
    for pair in windows_of(text):
        states, logits = model.keys_and_logits(model.batch([pair.src], [pair.tgt]))
        for query, row, token in zip(states[0], logits[0], model.tokenize([pair.src], [pair.tgt]).tgt[0], strict=True):
            z = row.double().numpy()
            plain = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
            distances = ((keys - query.double().numpy()) ** 2).sum(1)
            nearest = np.argsort(distances, kind="stable")[:k]
            weights = np.exp(-(distances[nearest] - distances[nearest[0]]) / temperature)
            knn = np.zeros_like(plain)
            np.add.at(knn, values[nearest], weights / weights.sum())
            found.append(math.log(lambda_ * knn[token] + (1 - lambda_) * plain[token]))
    return float(np.mean(found))


def test_perplexity_of_a_mixture_is_that_computed_by_hand(model: KeyedModel, memory: DatastoreMemory):
    settings = {"k": 3, "lambda_": 0.3, "temperature": 20.0}
    mixture = KnnSettings(nprobe=4, **settings).open(model, memory)  # type: ignore[arg-type]
    found = perplexities(model, {"base": PlainModel(), "knn": mixture}, windows_of(TEST), max_tokens=32)
    assert found["knn"].log_likelihood == pytest.approx(
        log_likelihood_by_hand(model, memory, TEST, **settings), abs=1e-3
    )  # type: ignore[arg-type]
    by_hand = log_likelihood_by_hand(model, memory, TEST, k=1, lambda_=0.0, temperature=1.0)
    assert found["base"].log_likelihood == pytest.approx(by_hand, abs=1e-4)
    assert found["base"].perplexity == pytest.approx(math.exp(-by_hand), rel=1e-4)
    assert found["base"].tokens == found["knn"].tokens == len(model.tokenizer(TEST, add_special_tokens=False).input_ids)
    assert found["base"].log_likelihood != found["knn"].log_likelihood
    assert found["base"].tokens_per_second > found["knn"].tokens_per_second > 0
    assert found["base"].search_share == 0 < found["knn"].search_share < 1


def test_λ_0_has_the_perplexity_of_the_plain_model(model: KeyedModel, memory: DatastoreMemory):
    mixtures = {"base": PlainModel(), "knn": KnnSettings(k=4, lambda_=0.0).open(model, memory)}
    found = perplexities(model, mixtures, windows_of(TEST))
    assert found["base"].log_likelihood == found["knn"].log_likelihood


def test_what_is_stored_is_predicted_better(model: KeyedModel, memory: DatastoreMemory):
    mixtures = {"base": PlainModel(), "knn": KnnSettings(k=1, lambda_=0.9, nprobe=4).open(model, memory)}
    found = perplexities(model, mixtures, windows_of(PAGE))
    assert found["knn"].perplexity < 1.2 < found["base"].perplexity


def test_tuning_takes_the_choice_that_is_best_by_hand(model: KeyedModel, memory: DatastoreMemory):
    tuned = tune_likelihood(model, memory, MixtureConfig.of(KnnSettings()), windows_of(VALIDATION), GRID)
    choices = [(k, share, t) for k in GRID.k for share in GRID.lambda_ for t in GRID.temperature or []]
    by_hand = {choice: log_likelihood_by_hand(model, memory, VALIDATION, *choice) for choice in choices}
    settings = tuned.best.mixture.settings
    assert settings is not None
    best = max(by_hand.values())
    assert tuned.best.log_likelihood > best - GRID.nprobe_tolerance - 1e-3
    if settings.nprobe == 4:  # every list
        assert by_hand[settings.k, settings.lambda_, settings.temperature] == pytest.approx(best, abs=1e-3)
    assert tuned.tried == 16
    assert tuned.plain_log_likelihood == pytest.approx(
        log_likelihood_by_hand(model, memory, VALIDATION, 1, 0.0, 1.0), abs=1e-4
    )


def test_nothing_to_predict_is_refused(model: KeyedModel, memory: DatastoreMemory):
    with pytest.raises(ValueError, match="the test split is empty"):
        perplexities(model, {"base": PlainModel()}, [])
    with pytest.raises(ValueError, match="the validation split is empty"):
        tune_likelihood(model, memory, MixtureConfig.of(), [], GRID)


def test_a_document_in_two_splits_is_refused():
    pairs = [Pair("", "a", "page"), Pair("a", "b", "page"), Pair("", "c")]
    check_documents_apart({"test": pairs, "validation": [Pair("", "d", "other"), Pair("", "c")]})
    with pytest.raises(ValueError, match="'page' is a document of test and of validation, expected each in one"):
        check_documents_apart({"test": pairs, "validation": pairs[:1]})


def test_the_table_names_perplexity_speed_and_imbalance():
    systems = {"base": Perplexity(-math.log(17), 100, 150.0), "knn": Perplexity(-math.log(12), 100, 120.0, 0.05, 0.4)}
    assert perplexity_table(systems, 1.25).splitlines()[2:] == [
        "| base   | 17.00      | -2.833         | 150      |                |                    |           |",
        "| knn    | 12.00      | -2.485         | 120      | 5.0%           | 0.40               | 1.25      |",
    ]


def evaluate(folder: Path, **options: object) -> None:
    evaluate_lm.evaluate_lm(
        backbone=BackboneConfig(str(folder / "model"), device="cpu"),
        datastore=folder / "store",
        out=folder / "out",
        decoding=Decoding(beams=1, max_new_tokens=12),
        **{"test": CorpusFile(folder / "test.jsonl"), **options},  # type: ignore[arg-type]
    )


def test_evaluate_lm_writes_results_and_a_translator_that_continues_texts(folder: Path):
    evaluate(folder, tuning=Tune(CorpusFile(folder / "validation.jsonl"), GRID))
    results = json.loads((folder / "out" / "results.json").read_text())
    tokens = {name: system["tokens"] for name, system in results["systems"].items()}
    assert tokens["base"] == tokens["knn"] > 0
    assert results["index"]["imbalance_factor"] >= 1
    assert results["tuning"]["tried"] == 16
    assert results["settings"]["mixture"]["knn"] == results["tuning"]["best"]["settings"]
    assert f"{results['systems']['knn']['perplexity']:.2f}" in (folder / "out" / "results.md").read_text()
    translator = load_translator(folder / "out" / "translate.yaml")
    assert translator.translate(["Choose File, then"]).tokens > 0


def test_evaluate_lm_refuses_documents_that_are_stored(folder: Path):
    with pytest.raises(ValueError, match="'passwords' is a document of the datastore and of test"):
        evaluate(folder, test=CorpusFile(folder / "train.jsonl"))
