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
    Candidate,
    Grid,
    check_apart,
    count_stored,
    default_temperatures,
    likelihoods,
    tune,
)
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.gates import ConfidenceGate, LearnedGate
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.reference import ReferenceStep, reference_steps
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.timing import Spans

VALIDATION = [Pair(f"7{pair.src}", pair.tgt) for pair in corpus_pairs(9, seed=3)]
GRID = Grid(k=[1, 3, 8], lambda_=[0.25, 0.8], temperature=[0.5, 20.0], nprobe=[1, 2, 4], finalists=2)
MIXTURE = MixtureConfig.of()
DECODING = Decoding(beams=1, batch_size=4, max_new_tokens=12)


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def store(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    with build_store(marian, tmp_path_factory.mktemp("tuning") / "store", corpus_pairs(40), 10) as store:
        build_index(store, IndexConfig("IVF4,Flat", train_points=160))
        build_index(store, IndexConfig("Flat", name="flat"))
        yield store


@pytest.fixture
def memory(store: Datastore) -> DatastoreMemory:
    return DatastoreMemory(store, open_index(store))


@pytest.fixture
def retrievals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(rows, k, nprobe) of every search."""
    calls = []
    retrieve = WholeStore.__call__

    def counted(self: WholeStore, step: Step) -> Neighbors:
        calls.append((len(step), self.k, self.nprobe))
        return retrieve(self, step)

    monkeypatch.setattr(WholeStore, "__call__", counted)
    return calls


def _all_keys(store: Datastore) -> np.ndarray:
    return np.concatenate(list(store.key_chunks())).astype(np.float64)


def _dense_log_likelihoods(
    model: Any, pair: Pair, backbone: KeyedModel, store: Datastore, settings: KnnSettings
) -> list[float]:
    """log p of each reference token of one pair, by Hugging Face's own logits and a search and mixture in numpy."""
    batch = backbone.batch([pair.src], [pair.tgt])
    assert batch.labels is not None
    inputs = torch.cat([torch.tensor([[backbone.start_id]]), batch.labels[:, :-1]], 1)
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


def settings_of(candidate: Candidate) -> KnnSettings:
    settings = candidate.mixture.settings
    assert settings is not None
    assert {name: getattr(settings, name) for name in candidate.options} == candidate.options
    return settings


def test_likelihood_of_every_setting_is_that_of_dense_mixtures(
    memory: DatastoreMemory, store: Datastore, marian: KeyedModel, marian_folder: Path
):
    model = AutoModelForSeq2SeqLM.from_pretrained(marian_folder).eval()
    candidates, _, counted = likelihoods(marian, memory, MIXTURE, VALIDATION, replace(GRID, max_tokens=30))
    assert len(candidates) == len(GRID.k) * len(GRID.lambda_) * 2 * len(GRID.nprobe)
    exhaustive = [candidate for candidate in candidates if settings_of(candidate).nprobe == 4]  # all four lists
    assert len({round(candidate.log_likelihood, 6) for candidate in exhaustive}) > 6
    for candidate in exhaustive:
        tokens = [
            log_prob
            for pair in VALIDATION
            for log_prob in _dense_log_likelihoods(model, pair, marian, store, settings_of(candidate))
        ]
        assert len(tokens) == counted
        assert candidate.log_likelihood == pytest.approx(sum(tokens) / len(tokens), abs=2e-4)


def test_likelihood_at_a_smaller_nprobe_is_that_of_its_own_search(memory: DatastoreMemory, marian: KeyedModel):
    references = list(reference_steps(marian, VALIDATION, 64))
    assert len(references) > 1
    for candidate in likelihoods(marian, memory, MIXTURE, VALIDATION, replace(GRID, max_tokens=64))[0]:
        settings = settings_of(candidate)
        log_probs = []
        for reference in references:
            neighbors = memory.search(reference.step.queries, settings.k, settings.nprobe)
            plain = reference.step.logits.double().softmax(1)
            for row, token in enumerate(reference.tokens.tolist()):
                weights = torch.softmax(-neighbors.distances[row].double() / settings.temperature, 0)
                share = float(weights[neighbors.values[row] == token].sum())
                log_probs.append(math.log(settings.lambda_ * share + (1 - settings.lambda_) * float(plain[row, token])))
        assert candidate.log_likelihood == pytest.approx(sum(log_probs) / len(log_probs), abs=1e-5)


def test_neighbors_are_retrieved_once_for_each_nprobe(
    memory: DatastoreMemory, marian: KeyedModel, retrievals: list[tuple[int, int, int]]
):
    _, _, tokens = likelihoods(marian, memory, MIXTURE, VALIDATION, replace(GRID, max_tokens=64))
    rows = [len(reference.tokens) for reference in reference_steps(marian, VALIDATION, 64)]
    assert sum(rows) == tokens and len(rows) > 1
    assert retrievals == [(count, 8, nprobe) for count in rows for nprobe in (1, 2, 4)]


def test_nprobe_beyond_the_lists_and_without_lists_is_tried_once(
    marian: KeyedModel, store: Datastore, retrievals: list[tuple[int, int, int]]
):
    grid = Grid(k=[2], lambda_=[0.5], temperature=[1.0], nprobe=[2, 4, 8, 16])
    found, flat = (
        likelihoods(marian, DatastoreMemory(store, open_index(store, name)), MIXTURE, VALIDATION, grid)[0]
        for name in ("index", "flat")
    )
    assert [settings_of(candidate).nprobe for candidate in found] == [2, 4]
    assert [settings_of(candidate).nprobe for candidate in flat] == [2]
    assert flat[0].log_likelihood == pytest.approx(found[1].log_likelihood, abs=1e-5)
    assert [nprobe for _, _, nprobe in retrievals] == [2, 4, 2]


@pytest.mark.parametrize("name", ["m2m100", "marian"])
def test_references_leave_out_only_what_decoding_forces(name: str, tiny_folder_of: Callable[[str], Path]):
    folder, family = tiny_folder_of(name), TINY_FAMILIES[name]
    backbone = load_model(str(folder), device="cpu", **family.languages)
    ids = backbone.tokenize([pair.src for pair in VALIDATION], [pair.tgt for pair in VALIDATION])
    first = 1 if name == "m2m100" else 0
    tokens = []
    for reference in reference_steps(backbone, VALIDATION, 40):
        assert len(reference.step) == len(reference.tokens)
        sentences = reference.step.sentence.tolist()
        for number in range(len(reference.batch)):
            labels = reference.batch.target_labels[number][reference.batch.target_mask[number]].tolist()
            own = [token for row, token in zip(sentences, reference.tokens.tolist(), strict=True) if row == number]
            assert own == labels[first:]
        tokens += reference.tokens.tolist()
    assert sorted(tokens) == sorted(token for row in ids.tgt for token in row[first:])


def test_an_improbable_reference_has_a_finite_likelihood(
    memory: DatastoreMemory, marian: KeyedModel, monkeypatch: pytest.MonkeyPatch
):
    def improbable(*args: Any) -> Iterator[ReferenceStep]:
        for reference in reference_steps(*args):
            logits = reference.step.logits.scatter_add(
                1,
                reference.tokens[:, None],
                torch.full((len(reference.tokens), 1), -400.0),  # exp gives 0 in float32
            )
            yield replace(reference, step=replace(reference.step, logits=logits))

    monkeypatch.setattr("lightning_knnmt.evaluation.tuning.reference_steps", improbable)
    candidates, plain, _ = likelihoods(marian, memory, MIXTURE, VALIDATION, GRID)
    assert -420 < plain < -400
    for candidate in candidates:
        assert plain - 2 < candidate.log_likelihood < 0


def test_temperatures_follow_the_scale_of_the_distances():
    distances = torch.tensor([[4.0, 9.0], [2.0, 3.0], [1e-5, 1.0], [8.0, torch.inf], [torch.inf, torch.inf]])
    assert default_temperatures(distances[:, 0], 50.0) == [0.4, 0.8, 1.6, 3.2, 6.4, 13.0]
    hundredfold = default_temperatures(distances[:, 0] * 100, 5000.0)
    assert hundredfold == pytest.approx([40.0, 80.0, 160.0, 320.0, 640.0, 1300.0])


@pytest.mark.parametrize("distance", [0.0, 1e-6, torch.inf])
def test_where_everything_is_stored_or_nothing_temperatures_follow_the_keys(distance: float):
    assert default_temperatures(torch.full((3,), distance), 50.0) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0]


def test_the_chosen_setting_has_the_best_validation_bleu_of_the_likeliest(memory: DatastoreMemory, marian: KeyedModel):
    tuned = tune(marian, memory, MIXTURE, VALIDATION, GRID, DECODING)
    candidates, _, tokens = likelihoods(marian, memory, MIXTURE, VALIDATION, GRID)
    assert (tuned.tried, tuned.tokens) == (len(candidates), tokens)
    plain = [
        float(log_probs[token])
        for reference in reference_steps(marian, VALIDATION, 100)
        for log_probs, token in zip(reference.step.logits.double().log_softmax(1), reference.tokens, strict=True)
    ]
    assert tuned.plain_log_likelihood == pytest.approx(np.mean(plain), abs=1e-5)
    assert tuned.best.settings is not None
    nprobe = tuned.best.settings.nprobe
    of_nprobe = {n: max(c.log_likelihood for c in candidates if settings_of(c).nprobe == n) for n in (1, 2, 4)}
    assert of_nprobe[nprobe] >= max(of_nprobe.values()) - GRID.nprobe_tolerance
    assert all(of_nprobe[n] < max(of_nprobe.values()) - GRID.nprobe_tolerance for n in of_nprobe if n < nprobe)
    references = [pair.tgt for pair in VALIDATION]
    for finalist in tuned.finalists:
        likeliest = max(
            (
                c
                for c in candidates
                if c.options["nprobe"] == nprobe and c.options["lambda_"] == finalist.options["lambda_"]
            ),
            key=lambda candidate: candidate.log_likelihood,
        )
        assert settings_of(finalist) == settings_of(likeliest)
        mixture = settings_of(finalist).open(marian, memory)
        texts = Translator(marian, mixture, DECODING).translate([pair.src for pair in VALIDATION]).texts
        assert finalist.bleu == corpus_scores(texts, references).bleu.value
    assert settings_of(tuned.finalists[0]) == tuned.best.settings
    assert tuned.finalists[0].bleu == max(finalist.bleu or 0.0 for finalist in tuned.finalists)


def test_neighbors_that_do_not_help_are_reported(
    memory: DatastoreMemory, marian: KeyedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    def wrong(self: WholeStore, step: Step) -> Neighbors:
        shape = len(step), self.k
        return Neighbors(torch.ones(shape), torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long))

    monkeypatch.setattr(WholeStore, "__call__", wrong)
    tune(marian, memory, MIXTURE, VALIDATION, Grid(k=[2], lambda_=[0.5], nprobe=[1]), DECODING)
    assert "no setting predicts the references better" in caplog.text


def test_a_source_in_both_splits_is_refused_whatever_its_case():
    test = [Pair("Guten Tag", "Good day"), Pair("Datei öffnen", "Open file")]
    validation = [Pair("Drucken", "Print"), Pair("datei  Öffnen", "Open the file")]
    with pytest.raises(
        ValueError, match="1 of 2 validation sources are in the test split too, such as 'datei  Öffnen'"
    ):
        check_apart(validation, test)
    check_apart(validation[:1], test)


def test_an_empty_validation_split_is_refused(memory: DatastoreMemory, marian: KeyedModel):
    with pytest.raises(ValueError, match="the validation split is empty, expected one pair or more"):
        tune(marian, memory, MIXTURE, [], GRID, DECODING)


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
        ({"max_loss": -0.1}, "max_loss is -0.1, expected 0 or more"),
        ({"finalists": 0}, "finalists is 0, expected 1 or more"),
        ({"max_tokens": 0}, "max_tokens is 0, expected 1 or more"),
    ],
)
def test_a_grid_without_sense_is_refused(options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        Grid(**options)


def test_sources_that_the_datastore_holds_are_counted_and_warned_of(
    memory: DatastoreMemory, store: Datastore, caplog: pytest.LogCaptureFixture
) -> None:
    stored = [Pair(source.upper() + "  ", "") for source in list(store.sources())[:2]]
    assert len(list(store.sources())) == store.manifest.pairs
    assert count_stored(memory, {"test": VALIDATION + stored, "validation": VALIDATION}) == {"test": 2, "validation": 0}
    assert f"2 of {len(VALIDATION) + 2} test sources are in the datastore too" in caplog.text
    assert "validation sources" not in caplog.text


def test_the_plain_models_bleu_is_reported_beside_the_finalists(memory: DatastoreMemory, marian: KeyedModel) -> None:
    tuning = tune(marian, memory, MIXTURE, VALIDATION, GRID, DECODING)
    texts = Translator(marian, decoding=DECODING).translate([pair.src for pair in VALIDATION]).texts
    assert tuning.plain_bleu == corpus_scores(texts, [pair.tgt for pair in VALIDATION]).bleu.value


@pytest.mark.parametrize("gate", [ConfidenceGate(), LearnedGate()])
def test_each_gate_has_the_likelihood_and_the_searches_of_its_mixture(
    gate: ConfidenceGate | LearnedGate, memory: DatastoreMemory, marian: KeyedModel, tmp_path: Path
) -> None:
    if isinstance(gate, LearnedGate):
        gate.bind(marian, memory)
        for parameter in gate.parameters():
            torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(3))
        gate.save(tmp_path, marian, memory)
        gate = LearnedGate(folder=tmp_path)
    thresholds = [0.0, 0.2, 0.4, 1.0] if isinstance(gate, ConfidenceGate) else [-9.0, -3.0, 0.0, 3.0, 9.0]
    grid = replace(GRID, k=[3], lambda_=[0.8], temperature=[20.0], nprobe=[4], others={"threshold": thresholds})
    candidates, plain, tokens = likelihoods(marian, memory, MixtureConfig.of(gate=gate), VALIDATION, grid)
    assert len(candidates) == len(thresholds) and len({candidate.searches for candidate in candidates}) > 2
    for candidate in candidates:
        mixture, spans, total = candidate.mixture.open(marian, memory), Spans(), 0.0
        for reference in reference_steps(marian, VALIDATION, 100):
            log_probs = mixture(reference.step, spans).double().log_softmax(1)
            total += float(log_probs.gather(1, reference.tokens[:, None]).sum())
        assert candidate.log_likelihood == pytest.approx(total / tokens, abs=1e-4)
        assert candidate.searches == pytest.approx(spans.counts["search"] / tokens)
        assert candidate.searches > 0 or candidate.log_likelihood == pytest.approx(plain)


def test_for_a_stated_loss_the_gate_that_searches_least_is_taken(memory: DatastoreMemory, marian: KeyedModel) -> None:
    mixture = MixtureConfig.of(gate=ConfidenceGate())
    base = replace(GRID, k=[3], lambda_=[0.25, 0.8], temperature=[20.0], nprobe=[4])
    assert "threshold" not in base.values_for(mixture, 4)
    searches = []
    for max_loss in (0.0, 0.05, 10.0):
        grid = replace(base, max_loss=max_loss)
        assert grid.values_for(mixture, 4)["threshold"] == list(ConfidenceGate.usual_options["threshold"])
        tried = [0.05, 0.1, 0.2, 0.3, 0.4, 1.0]  # which this model's probabilities lie between
        grid = replace(grid, others={"threshold": tried})
        tuned = tune(marian, memory, mixture, VALIDATION, grid, DECODING)
        candidates, *_ = likelihoods(marian, memory, mixture, VALIDATION, grid)
        assert len(candidates) == tuned.tried == 2 * len(tried)
        least = max(candidate.log_likelihood for candidate in candidates) - max_loss
        enough = [candidate for candidate in candidates if candidate.log_likelihood >= least]
        fewest = min(candidate.searches for candidate in enough)
        assert {finalist.searches for finalist in tuned.finalists} == {fewest}
        assert all(finalist.log_likelihood >= least for finalist in tuned.finalists)
        searches.append(fewest)
    assert searches[0] >= searches[1] >= searches[2] < searches[0]
