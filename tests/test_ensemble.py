"""Ensembles of models with memories of their own, against a plain loop that averages probabilities."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
import yaml
from script_runs import DECODING, Domain, expect_error, run, write_config
from test_knn import softmax
from tiny_models import ENGLISH, GERMAN, TINY_FAMILIES

import build_index
import evaluate
import translate
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.ensemble import EnsembleTranslator
from lightning_knnmt.evaluation.explanation import explain, explain_translator
from lightning_knnmt.knn.gates import ConfidenceGate
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.loading import load_translator
from lightning_knnmt.timing import Spans

FAMILIES = ["marian", "mbart50", "firefox"]
KNN = KnnSettings(k=4, lambda_=0.5, temperature=20.0)
LENGTH = 12


def changed(folder: Path, name: str, seed: int) -> KeyedModel:
    """A tiny model whose weights differ from those of its folder."""
    model = load_model(str(folder), device="cpu", **TINY_FAMILIES[name].languages)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter += 0.3 * parameter.std(correction=0) * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest, tiny_folder_of: Callable[[str], Path]) -> list[KeyedModel]:
    """Three models of a family."""
    return [changed(tiny_folder_of(request.param), request.param, seed) for seed in range(3)]


def translators(
    models: Sequence[KeyedModel], knn: KnnSettings | None = KNN, beams: int = 1, loop: Any = "own", **options: Any
) -> list[Translator]:
    """A translator of each, with a memory of other sentences for each; None: plain models."""
    decoding = Decoding(beams=beams, max_new_tokens=LENGTH, loop=loop, batch_size=3, options=options)
    found = []
    for number, model in enumerate(models):
        mixture: Mixture | PlainModel = PlainModel()
        if knn is not None:
            memory = build_memory(model, GERMAN[number:], ENGLISH[number:])
            mixture = knn.open(model, memory)
        found.append(Translator(model, mixture, decoding))
    return found


def sequences(translator: Translator) -> list[list[int]]:
    batch = translator.model.batch(GERMAN)
    return translator.generate(batch, Spans()).tolist()


def knn_probs(translator: Translator, query: torch.Tensor, size: int) -> np.ndarray:
    memory: Any = translator.mixture.memory  # type: ignore[union-attr]
    keys, values = memory.keys.double().numpy(), memory.values.numpy()
    distances = ((keys - query.double().numpy()) ** 2).sum(1)
    nearest = distances.argsort()[: KNN.k]
    shares = softmax(-distances[nearest][None] / KNN.temperature)[0]
    found = np.zeros(size)
    np.add.at(found, values[nearest], shares)
    return found


def plain_loop(members: list[Translator], weights: Sequence[float], source: str, given: list[int]) -> np.ndarray:
    """Averaged log-probabilities of every token after each part of a sequence, shape (T, V), in numpy."""
    total: Any = 0.0
    for member, weight in zip(members, weights, strict=True):
        batch = member.model.batch([source])
        batch.labels = torch.tensor([given])
        with torch.inference_mode():
            keys, logits = member.model.keys_and_logits(batch)
        model = softmax(logits[0].double().numpy())
        knn = np.stack([knn_probs(member, key, model.shape[1]) for key in keys[0]])
        total = total + weight / sum(weights) * (KNN.lambda_ * knn + (1 - KNN.lambda_) * model)
    return np.log(total)


def test_greedy_decoding_takes_the_best_of_the_averaged_probabilities(models: list[KeyedModel]) -> None:
    members, weights = translators(models), [0.5, 2.0, 1.0]
    ensemble = EnsembleTranslator(members, weights)
    rules: Any = models[0].search_rules()
    banned = [word[0] for word in rules[0].generation_config.bad_words_ids or []]
    alone = [sequences(member) for member in members]
    found = sequences(ensemble)
    for number, source in enumerate(GERMAN):
        produced = found[number][1:]
        if models[0].tokenizer.eos_token_id in produced:
            produced = produced[: produced.index(models[0].tokenizer.eos_token_id) + 1]
        log_probs = plain_loop(members, weights, source, produced)
        log_probs[:, banned] = -np.inf
        first = 0 if models[0].forced_id is None else 1  # a forced token is not chosen
        for place in range(first, len(produced)):
            if place == LENGTH - 1 and produced[place] == models[0].tokenizer.eos_token_id:
                continue  # some models end what has grown too long
            assert log_probs[place, produced[place]] >= log_probs[place].max() - 1e-4
    assert any(found != other for other in alone)


@pytest.mark.parametrize("options", [{"beams": 1}, {"beams": 3}, {"beams": 2, "no_repeat_ngram_size": 2}])
def test_generate_gives_what_the_own_search_gives(models: list[KeyedModel], options: dict[str, Any]) -> None:
    own, theirs = (
        sequences(EnsembleTranslator(translators(models, loop=loop, **options), [1.0, 2.0, 0.5]))
        for loop in ("own", "generate")
    )
    assert own == theirs


@pytest.mark.parametrize("loop", ["own", "generate"])
def test_lambda_0_is_the_plain_ensemble(models: list[KeyedModel], loop: str) -> None:
    plain, mixed = (
        EnsembleTranslator(translators(models, knn, 2, loop)) for knn in (None, KnnSettings(k=4, lambda_=0.0))
    )
    assert sequences(plain) == sequences(mixed)


@pytest.mark.parametrize("loop", ["own", "generate"])
def test_an_ensemble_of_one_and_of_one_twice_is_that_one(models: list[KeyedModel], loop: str) -> None:
    (alone,) = translators(models[:1], beams=3, loop=loop)
    assert sequences(EnsembleTranslator([alone])) == sequences(alone)
    assert sequences(EnsembleTranslator([alone, alone], [3.0, 1.0])) == sequences(alone)


def test_sentences_that_enter_later_are_translated_as_those_of_one_batch(models: list[KeyedModel]) -> None:
    ensemble = EnsembleTranslator(translators(models, beams=2))
    together = models[0].tokenizer.batch_decode(sequences(ensemble), skip_special_tokens=True)
    assert ensemble.translate(GERMAN).texts == together


def test_rows_that_a_gate_keeps_from_searching_keep_their_models_prediction(models: list[KeyedModel]) -> None:
    shut = ConfidenceGate(0.0)
    members = translators(models, beams=2)
    for member in members:
        mixture: Any = member.mixture
        member.mixture = Mixture(member.model, mixture.memory, mixture.retriever, mixture.combiner, shut)
    assert sequences(EnsembleTranslator(members)) == sequences(EnsembleTranslator(translators(models, None, 2)))


def test_explanations_give_the_means_and_say_which_store(models: list[KeyedModel]) -> None:
    members, weights = translators(models[:2], beams=2), [1.0, 3.0]
    for source in GERMAN[:2]:
        found = explain_translator(EnsembleTranslator(members, weights), source, KNN.k)
        assert found.text == EnsembleTranslator(members, weights).translate([source]).texts[0]
        tokens = models[0].tokenizer.convert_tokens_to_ids([token.token for token in found.tokens])
        expected = np.exp(plain_loop(members, weights, source, tokens))
        for place, token in enumerate(found.tokens):
            np.testing.assert_allclose(token.probability, expected[place, tokens[place]], rtol=1e-3, atol=1e-6)
            assert sum(neighbor.share for neighbor in token.neighbors) == pytest.approx(1.0, abs=1e-4)
            assert {neighbor.context.store for neighbor in token.neighbors} == {models[0].name}
    alone = cast(Mixture, members[0].mixture)
    same = explain_translator(EnsembleTranslator(members[:1]), GERMAN[0])
    assert [token.probability for token in same.tokens] == [
        token.probability for token in explain(alone, GERMAN[0], members[0].decoding).tokens
    ]


# ---- what is refused


def test_models_of_other_tokens_are_refused_and_named(tiny_folder_of: Callable[[str], Path]) -> None:
    one, other = (changed(tiny_folder_of(name), name, 0) for name in ("marian", "firefox"))
    message = f"{one.name} and {other.name} cannot be one ensemble: tokenizer is .* expected the same"
    with pytest.raises(ValueError, match=message):
        EnsembleTranslator(translators([one, other], None))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0], "weights has 1 numbers, expected 2, one for each model"),
        ([1.0, 0.0], "weights is 0.0, expected more than 0 and finite"),
    ],
)
def test_weights_that_do_not_fit_are_refused(backbone: KeyedModel, weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EnsembleTranslator(translators([backbone, backbone], None), weights)


def test_what_an_ensemble_cannot_do_is_refused(backbone: KeyedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="there are no members, expected one translator or more"):
        EnsembleTranslator([])
    members = translators([backbone, backbone], None)
    monkeypatch.setattr(type(backbone), "search_rules", KeyedModel.search_rules)
    with pytest.raises(ValueError, match="is decoded by generate alone, expected translation models"):
        EnsembleTranslator(members)


# ---- scripts


def test_scripts_take_an_ensemble_and_tune_each_member(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    second = tmp_path / "second"
    changed(domain.model, "marian_scratch", 5).save(second)
    build = {
        "backbone": {"model": second, "device": "cpu"},
        "datastore": {"folder": tmp_path / "store", "corpus": {"path": domain.root / "data" / "train.jsonl"}},
        "index": {"factory": "Flat"},
    }
    run(build_index.build, "--config", write_config(tmp_path / "build.yaml", build))
    member = {
        "backbone": {"model": second, "device": "cpu"},
        "datastore": tmp_path / "store",
        "retriever": {"class_path": "lightning_knnmt.knn.retrievers.whole_store.WholeStore", "init_args": {"k": 2}},
        "weight": 0.5,
    }
    common = {
        "backbone": {"model": domain.model, "device": "cpu"},
        "datastore": domain.root / "store",
        "decoding": DECODING,
        "ensemble_with": [member],
    }
    evaluation = {
        **common,
        "test": {"path": domain.root / "data" / "test.jsonl"},
        "tuning": {
            "validation": {"path": domain.root / "data" / "validation.jsonl"},
            "grid": {"k": [3], "lambda_": [0.5], "nprobe": [4], "temperature": [8.0], "finalists": 1},
        },
        "repeats": 1, "out": tmp_path / "out",
    }  # fmt: skip
    run(evaluate.evaluate, "--config", write_config(tmp_path / "evaluate.yaml", evaluation))
    table = (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    systems = ("base", "knn", "model_2", "knn_model_2", "ensemble", "knn_ensemble")
    assert [name for name in systems if f"| {name} " in table] == list(systems)
    written = yaml.safe_load((tmp_path / "out" / "translate.yaml").read_text(encoding="utf-8"))
    (tuned,) = written["ensemble_with"]
    assert tuned["weight"] == 0.5 and tuned["knn"]["k"] == 3
    translator = load_translator(tmp_path / "out" / "translate.yaml")
    assert isinstance(translator, EnsembleTranslator) and translator.weights == (1.0, 0.5)
    (tmp_path / "in.txt").write_text("\n".join(domain.sources("test")) + "\n", encoding="utf-8")
    files = ("--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    run(translate.translate, "--config", tmp_path / "out" / "translate.yaml", *files, "--explain", "1")
    explained = (tmp_path / "out.txt").read_text(encoding="utf-8")
    assert f"({domain.root / 'store'})" in explained and f"({tmp_path / 'store'})" in explained
    assert translator.translate(domain.sources("test")).texts == [
        line for line in explained.splitlines() if line and not line.startswith(" ")
    ]
    config = write_config(tmp_path / "two.yaml", common)
    expect_error(
        capsys, translate.translate, "--config", config, "--processes.devices", "2", *files, "--overwrite", "true",
        expected="ensemble_with is given, which one process decodes alone",
    )  # fmt: skip
    expect_error(
        capsys, translate.translate, "--config", config, "--decoding.shortlist", "model", *files, "--overwrite", "true",
        expected="shortlist is model, expected none: the models of an ensemble",
    )  # fmt: skip
    other = write_config(tmp_path / "other.yaml", {**evaluation, "others": {"model_2": {"model": second, "datastore":
                         tmp_path / "store"}}, "overwrite": True})  # fmt: skip
    expect_error(capsys, evaluate.evaluate, "--config", other, expected="others has model_2, as members of")
