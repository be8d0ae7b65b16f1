"""Tuning against mixtures recomputed densely, row by row."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import TINY_FAMILIES
from tiny_stores import build_store, corpus_pairs
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.scores import corpus_scores
from lightning_knnmt.evaluation.tuning import (
    Grid,
    check_apart,
    count_stored,
    default_temperatures,
    likelihoods,
    reference_states,
    tune,
)
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.memory import KnnSearch, KnnSettings
from lightning_knnmt.knn.retrievers.whole_store import DatastoreRetriever, Neighbors

VALIDATION = [Pair(f"7{pair.src}", pair.tgt) for pair in corpus_pairs(9, seed=3)]
GRID = Grid(k=[1, 3, 8], lambda_=[0.25, 0.8], temperature=[0.5, 20.0], nprobe=[1, 2, 4], finalists=2)
DECODING = Decoding(beams=1, batch_size=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def store(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with build_store(marian, tmp_path_factory.mktemp("tuning") / "store", corpus_pairs(40), 100) as store:
        build_index(store, IndexConfig("IVF4,Flat", train_points=160))
        build_index(store, IndexConfig("Flat", name="flat"))
        yield store


@pytest.fixture
def search(marian: KeyedModel, store: Datastore) -> KnnSearch:
    return KnnSearch(marian, store)


@pytest.fixture
def retrievals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(queries, k, nprobe) of every search."""
    calls = []
    retrieve = DatastoreRetriever.retrieve

    def counted(self: DatastoreRetriever, queries: torch.Tensor) -> Neighbors:
        calls.append((len(queries), self.k, self.nprobe))
        return retrieve(self, queries)

    monkeypatch.setattr(DatastoreRetriever, "retrieve", counted)
    return calls


def _all_keys(store: Datastore) -> np.ndarray:
    return np.concatenate(list(store.key_chunks())).astype(np.float64)


def _dense_log_likelihoods(
    model: Any, pair: Pair, backbone: KeyedModel, store: Datastore, settings: KnnSettings
) -> list[float]:
    """log p of each reference token of one pair, by Hugging Face's own logits and a search and mixture in numpy."""
    batch = backbone.batch([pair.src], [pair.tgt])
    assert batch.labels is not None
    inputs = torch.cat([torch.tensor([[backbone.start.start_id]]), batch.labels[:, :-1]], 1)
    with torch.no_grad():
        output = model(input_ids=batch.input_ids, decoder_input_ids=inputs, output_hidden_states=True)
    states = output.decoder_hidden_states[-1][0].double().numpy()
    keys, values = _all_keys(store), store.values
    found = []
    for step, (state, token) in enumerate(zip(states, batch.labels[0].tolist(), strict=True)):
        plain = output.logits[0, step].double().softmax(-1).numpy()
        distances = ((keys - state) ** 2).sum(1)
        nearest = np.argsort(distances)[: settings.k]
        weights = np.exp(-(distances[nearest] - distances[nearest].min()) / settings.temperature)
        knn = np.zeros_like(plain)
        for value, weight in zip(values[nearest], weights / weights.sum(), strict=True):
            knn[value] += weight
        found.append(math.log(settings.lambda_ * knn[token] + (1 - settings.lambda_) * plain[token]))
    return found


def test_likelihood_of_every_setting_is_that_of_dense_mixtures(
    search: KnnSearch, store: Datastore, marian: KeyedModel, marian_folder: Path
):
    model = AutoModelForSeq2SeqLM.from_pretrained(marian_folder).eval()
    states = reference_states(marian, VALIDATION, max_tokens=30)
    candidates = likelihoods(search, states, GRID)
    assert len(candidates) == len(GRID.k) * len(GRID.lambda_) * 2 * len(GRID.nprobe)
    exhaustive = [candidate for candidate in candidates if candidate.settings.nprobe == 4]  # all four lists
    assert len({round(candidate.log_likelihood, 6) for candidate in exhaustive}) > 6
    for candidate in exhaustive:
        tokens = [
            log_prob
            for pair in VALIDATION
            for log_prob in _dense_log_likelihoods(model, pair, marian, store, candidate.settings)
        ]
        assert len(tokens) == len(states.tokens)
        assert candidate.log_likelihood == pytest.approx(sum(tokens) / len(tokens), abs=2e-4)


def test_likelihood_at_a_smaller_nprobe_is_that_of_its_own_search(search: KnnSearch, marian: KeyedModel):
    states = reference_states(marian, VALIDATION, max_tokens=64)
    for candidate in likelihoods(search, states, GRID):
        settings = candidate.settings
        neighbors = search.retriever(settings.k, settings.nprobe).retrieve(states.queries)
        log_probs = []
        for row in range(len(states.tokens)):
            plain = float(states.log_probs[row].double().exp())
            weights = torch.softmax(-neighbors.distances[row].double() / settings.temperature, 0)
            share = float(weights[neighbors.values[row] == states.tokens[row]].sum())
            log_probs.append(math.log(settings.lambda_ * share + (1 - settings.lambda_) * plain))
        assert candidate.log_likelihood == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-5)


def test_neighbors_are_retrieved_once_for_each_nprobe(
    search: KnnSearch, marian: KeyedModel, retrievals: list[tuple[int, int, int]]
):
    states = reference_states(marian, VALIDATION, max_tokens=64)
    likelihoods(search, states, GRID)
    assert retrievals == [(len(states.tokens), 8, nprobe) for nprobe in (1, 2, 4)]


def test_nprobe_beyond_the_lists_and_without_lists_is_tried_once(
    marian: KeyedModel, store: Datastore, retrievals: list[tuple[int, int, int]]
):
    states = reference_states(marian, VALIDATION, max_tokens=64)
    grid = Grid(k=[2], lambda_=[0.5], temperature=[1.0], nprobe=[2, 4, 8, 16])
    found = likelihoods(KnnSearch(marian, store), states, grid)
    assert [candidate.settings.nprobe for candidate in found] == [2, 4]
    flat = likelihoods(KnnSearch(marian, store, "flat"), states, grid)
    assert [candidate.settings.nprobe for candidate in flat] == [2]
    assert flat[0].log_likelihood == pytest.approx(found[1].log_likelihood, abs=1e-5)
    assert [nprobe for _, _, nprobe in retrievals] == [2, 4, 2]


@pytest.mark.parametrize("name", ["m2m100", "marian"])
def test_reference_states_leave_out_only_what_decoding_forces(name: str, tiny_folder_of: Callable[[str], Path]):
    folder, family = tiny_folder_of(name), TINY_FAMILIES[name]
    backbone = load_model(str(folder), device="cpu", **family.languages)
    states = reference_states(backbone, VALIDATION, max_tokens=40)
    ids = backbone.tokenize([pair.src for pair in VALIDATION], [pair.tgt for pair in VALIDATION])[1]
    first = 1 if name == "m2m100" else 0
    assert sorted(states.tokens.tolist()) == sorted(token for row in ids for token in row[first:])


def test_an_improbable_reference_has_a_finite_likelihood(search: KnnSearch, marian: KeyedModel):
    states = reference_states(marian, VALIDATION, max_tokens=64)
    states = replace(states, log_probs=torch.full_like(states.log_probs, -400.0))  # exp gives 0 in float32
    for candidate in likelihoods(search, states, GRID):
        assert -401 < candidate.log_likelihood < 0


def test_temperatures_follow_the_scale_of_the_distances():
    distances = torch.tensor([[4.0, 9.0], [2.0, 3.0], [1e-5, 1.0], [8.0, torch.inf], [torch.inf, torch.inf]])
    assert default_temperatures(distances, 50.0) == [0.4, 0.8, 1.6, 3.2, 6.4, 13.0]
    hundredfold = default_temperatures(distances * 100, 5000.0)
    assert hundredfold == pytest.approx([40.0, 80.0, 160.0, 320.0, 640.0, 1300.0])


@pytest.mark.parametrize("distance", [0.0, 1e-6, torch.inf])
def test_where_everything_is_stored_or_nothing_temperatures_follow_the_keys(distance: float):
    assert default_temperatures(torch.full((3, 2), distance), 50.0) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_the_chosen_setting_has_the_best_validation_bleu_of_the_likeliest(search: KnnSearch):
    tuned = tune(search, VALIDATION, GRID, DECODING)
    states = reference_states(search.backbone, VALIDATION, GRID.max_tokens)
    candidates = likelihoods(search, states, GRID)
    assert (tuned.tried, tuned.tokens) == (len(candidates), len(states.tokens))
    assert tuned.plain_log_likelihood == pytest.approx(float(states.log_probs.mean()), abs=1e-5)
    nprobe = tuned.best.nprobe
    of_nprobe = {n: max(c.log_likelihood for c in candidates if c.settings.nprobe == n) for n in (1, 2, 4)}
    assert of_nprobe[nprobe] >= max(of_nprobe.values()) - GRID.nprobe_tolerance
    assert all(of_nprobe[n] < max(of_nprobe.values()) - GRID.nprobe_tolerance for n in of_nprobe if n < nprobe)
    references = [pair.tgt for pair in VALIDATION]
    for finalist in tuned.finalists:
        likeliest = max(
            (c for c in candidates if c.settings.nprobe == nprobe and c.settings.lambda_ == finalist.settings.lambda_),
            key=lambda candidate: candidate.log_likelihood,
        )
        assert finalist.settings == likeliest.settings
        texts = search.translator(finalist.settings, DECODING).translate([pair.src for pair in VALIDATION]).texts
        assert finalist.bleu == corpus_scores(texts, references).bleu.value
    assert tuned.finalists[0].settings == tuned.best
    assert tuned.finalists[0].bleu == max(finalist.bleu or 0.0 for finalist in tuned.finalists)


def test_neighbors_that_do_not_help_are_reported(
    search: KnnSearch, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def wrong(self: DatastoreRetriever, queries: torch.Tensor) -> Neighbors:
        shape = len(queries), self.k
        return Neighbors(torch.ones(shape), torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long))

    monkeypatch.setattr(DatastoreRetriever, "retrieve", wrong)
    tune(search, VALIDATION, Grid(k=[2], lambda_=[0.5], nprobe=[1]), DECODING)
    assert "no setting predicts the references better" in caplog.text


def test_a_source_in_both_splits_is_refused_whatever_its_case():
    test = [Pair("Guten Tag", "Good day"), Pair("Datei öffnen", "Open file")]
    validation = [Pair("Drucken", "Print"), Pair("datei  Öffnen", "Open the file")]
    with pytest.raises(
        ValueError, match="1 of 2 validation sources are in the test split too, such as 'datei  Öffnen'"
    ):
        check_apart(validation, test)
    check_apart(validation[:1], test)


def test_an_empty_validation_split_is_refused(search: KnnSearch):
    with pytest.raises(ValueError, match="the validation split is empty, expected one pair or more"):
        tune(search, [], GRID, DECODING)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": []}, "k is empty"),
        ({"temperature": []}, "temperature is empty"),
        ({"k": [4, 0]}, r"k is \[4, 0\], expected 1 or more"),
        ({"nprobe": [0]}, r"nprobe is \[0\], expected 1 or more"),
        ({"lambda_": [0.5, 1.0]}, r"lambda_ is \[0.5, 1.0\], expected values between 0 and 1"),
        ({"temperature": [0.0]}, r"temperature is \[0.0\], expected more than 0"),
        ({"nprobe_tolerance": -1.0}, "nprobe_tolerance is -1.0, expected 0 or more"),
        ({"finalists": 0}, "finalists is 0, expected 1 or more"),
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 or more"),
    ],
)
def test_a_grid_without_sense_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Grid(**options)


def test_sources_that_the_datastore_holds_are_counted_and_warned_of(
    store: Datastore, caplog: pytest.LogCaptureFixture
) -> None:
    stored = [Pair(source.upper() + "  ", "") for source in list(store.sources())[:2]]
    assert len(list(store.sources())) == store.manifest.pairs
    assert count_stored(store, {"test": VALIDATION + stored, "validation": VALIDATION}) == {"test": 2, "validation": 0}
    assert f"2 of {len(VALIDATION) + 2} test sources are in the datastore too" in caplog.text
    assert "validation sources" not in caplog.text


def test_the_plain_models_bleu_is_reported_beside_the_finalists(search: KnnSearch, marian: KeyedModel) -> None:
    tuning = tune(search, VALIDATION, GRID, DECODING)
    texts = Translator(marian, DECODING).translate([pair.src for pair in VALIDATION]).texts
    assert tuning.plain_bleu == corpus_scores(texts, [pair.tgt for pair in VALIDATION]).bleu.value
