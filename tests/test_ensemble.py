"""Ensembles of models with memories of their own, against a plain loop that averages probabilities."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_knn import softmax
from tiny_models import ENGLISH, GERMAN, TINY_FAMILIES

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.ensemble import EnsembleTranslator
from lightning_knnmt.knn.gates import ConfidenceGate
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.settings import KnnSettings
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
