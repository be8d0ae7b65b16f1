"""Datastores of one sentence against plain loops; a pair just added counts at once, and none sees its own reference."""

import json
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from script_runs import DECODING, Domain, expect_error, run, write_config
from tiny_stores import corpus_pairs

import evaluate
import translate
from lightning_knnmt import build_memory, load_model, load_translator
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain
from lightning_knnmt.evaluation.online import OnlineTranslator
from lightning_knnmt.knn import pair_memory
from lightning_knnmt.knn.combiners.distance_aware import DistanceAwareCombiner
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.knn.retrievers.per_sentence import PerSentence
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.knn.step import Step
from lightning_knnmt.sentences.words import words

PAIRS = corpus_pairs(30)
SOURCES = ["Klicken Sie auf die Datei", f"{PAIRS[4].src} Datei", "7", "nichts davon hier"]
PARTS: dict[str, Any] = {
    "retriever": {
        "class_path": "lightning_knnmt.knn.retrievers.per_sentence.PerSentence",
        "init_args": {"k": 2, "sentences": 3, "candidates": 16},
    },
    "combiner": {
        "class_path": "lightning_knnmt.knn.combiners.distance_aware.DistanceAwareCombiner",
        "init_args": {"tau": 40.0, "temperature": 20.0},
    },
}


@pytest.fixture(scope="module")
def model(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


def edit_distance(a: list[str], b: list[str]) -> int:
    """The textbook's table."""
    table = np.zeros((len(a) + 1, len(b) + 1), int)
    table[:, 0], table[0] = range(len(a) + 1), range(len(b) + 1)
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            changed = table[i - 1, j - 1] + (a[i - 1] != b[j - 1])
            table[i, j] = min(changed, table[i - 1, j] + 1, table[i, j - 1] + 1)
    return int(table[-1, -1])


def likeness(a: str, b: str) -> float:
    one, other = words(a), words(b)
    return 1 - edit_distance(one, other) / max(len(one), len(other))


def similar(source: str, pairs: list[Pair], count: int) -> list[int]:
    order = sorted(range(len(pairs)), key=lambda number: (-likeness(source, pairs[number].src), number))
    return [number for number in order if likeness(source, pairs[number].src) > 0][:count]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("ranked", [0, 10, 30])
def test_the_most_similar_pairs_are_those_of_the_edit_distance(
    source: str, ranked: int, model: KeyedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pair_memory, "MOST_UNRANKED", 1000)
    memory = PairMemory(model, PAIRS[:ranked])
    memory.similar(source, 1)  # ranks these
    memory.add(PAIRS[ranked:])
    assert memory.similar(source, 5, 1000) == similar(source, PAIRS, 5)
    memory.keep(12)
    assert memory.similar(source, 5, 1000) == similar(source, PAIRS[:12], 5)


def test_few_candidates_are_the_best_by_bm25_and_what_was_added_since(model: KeyedModel) -> None:
    memory = PairMemory(model, PAIRS)
    assert memory.similar(PAIRS[3].src, 5, candidates=1) == [3]
    memory.add([Pair(f"{PAIRS[3].src} mehr", "more")])
    assert memory.similar(PAIRS[3].src, 5, candidates=1) == [3, len(PAIRS)]


def test_many_added_pairs_are_ranked_anew(model: KeyedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair_memory, "MOST_UNRANKED", 5)
    memory = PairMemory(model, [])
    assert memory.similar("Datei", 3) == []
    memory.add(PAIRS)
    assert len(memory) == len(PAIRS)
    for source in SOURCES:
        assert memory.similar(source, 4, 1000) == similar(source, PAIRS, 4)


@pytest.mark.parametrize("k", [1, 3, 500])
def test_neighbors_are_the_nearest_tokens_of_the_sentence_s_own_pairs(k: int, model: KeyedModel) -> None:
    memory = PairMemory(model, PAIRS)
    retriever = PerSentence(k, 3, 64)
    retriever.bind(model, memory)
    retriever.begin(model.batch(SOURCES))
    states = torch.randn(9, model.key_size, generator=torch.Generator().manual_seed(0))
    sentence = torch.tensor([2, 0, 0, 1, 3, 1, 2, 0, 3])
    found = retriever(Step(states, torch.zeros(9, 2), sentence))
    for row in range(9):
        numbers = memory.similar(SOURCES[sentence[row]], 3)
        own = build_memory(model, [PAIRS[n].src for n in numbers], [PAIRS[n].tgt for n in numbers])
        keys = own.keys.float().numpy()
        distances = ((keys - states[row].numpy()) ** 2).sum(1)
        order = distances.argsort()[:k]
        some = len(order)
        np.testing.assert_allclose(found.distances[row, :some], distances[order], rtol=0.01)
        assert found.distances[row, some:].isinf().all() and (found.ids[row, some:] == -1).all()
        for entry, value in zip(found.ids[row, :some].tolist(), found.values[row, :some].tolist(), strict=True):
            context = memory.context(entry)
            assert context.number in numbers and context.pair == PAIRS[context.number]
            assert model.tokenize([""], [context.pair.tgt]).tgt[0][context.position] == value


def test_keys_and_values_of_entries_are_those_of_a_memory_in_ram(model: KeyedModel) -> None:
    memory, stored = PairMemory(model, PAIRS), build_memory(model, [p.src for p in PAIRS], [p.tgt for p in PAIRS])
    context = stored.context(57)
    ids = torch.tensor([[context.number * pair_memory.POSITIONS + context.position, -1], [0, pair_memory.POSITIONS]])
    expected = torch.tensor([[57, -1], [0, len(model.tokenize([""], [PAIRS[0].tgt]).tgt[0])]])
    torch.testing.assert_close(memory.keys_of(ids), stored.keys_of(expected), rtol=0.01, atol=0.01)
    assert torch.equal(memory.values_of(ids), stored.values_of(expected))
    before = memory.fingerprint
    memory.add(PAIRS[:1])
    assert before != memory.fingerprint and len(before) == 64
    memory.keep(len(PAIRS))
    assert memory.fingerprint == before


def test_a_sentence_like_none_keeps_the_model_s_prediction(model: KeyedModel) -> None:
    memory = PairMemory(model, PAIRS)
    mixture = Mixture(model, memory, PerSentence(), DistanceAwareCombiner())
    batch = model.batch(["@@@"])
    mixture.begin(batch)
    step = Step(torch.randn(2, model.key_size), torch.randn(2, model.vocabulary_size), torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(mixture(step), step.logits)


def test_distance_aware_lambda_is_the_paper_s() -> None:
    distances = torch.tensor([[0.0, 30.0], [25.0, 75.0], [50.0, 50.0], [900.0, 901.0], [torch.inf, torch.inf]])
    ids = torch.where(distances.isfinite(), 0, -1)
    step = Step(torch.zeros(5, 1), torch.randn(5, 4, generator=torch.Generator().manual_seed(1)), torch.arange(5))
    values = torch.tensor([[1, 3]]).expand(5, 2)
    mixed = DistanceAwareCombiner(tau=50, temperature=25)(step, Neighbors(distances, values, ids)).softmax(1)
    plain = step.logits.softmax(1)
    for row in range(5):
        nearest, second = distances[row].tolist()
        lambda_ = max(0.0, 1 - nearest / 50)
        expected = (1 - lambda_) * plain[row]
        if lambda_:
            shares = np.exp([-nearest / 25, -second / 25])
            for value, share in zip((1, 3), shares / shares.sum(), strict=True):
                expected[value] += lambda_ * share
        torch.testing.assert_close(mixed[row], expected)
    torch.testing.assert_close(DistanceAwareCombiner()(step, no_neighbors(5, 2)).softmax(1), plain)


def test_a_pair_just_added_counts_at_once(model: KeyedModel) -> None:
    memory = PairMemory(model, PAIRS)
    mixture = Mixture(model, memory, PerSentence(1, 2, 8), DistanceAwareCombiner(tau=1e4))
    translator = Translator(model, mixture, Decoding(**DECODING))
    before = translator.translate(["Das Passwort ist falsch."]).texts
    memory.add([Pair("Das Passwort ist falsch.", "The printer is green.")])
    assert translator.translate(["Das Passwort ist falsch."]).texts == ["The printer is green."] != before


def test_online_learning_knows_the_references_before_and_not_its_own(model: KeyedModel) -> None:
    pairs = [Pair("Der Zug fährt ab.", "File door open."), Pair("Eine Taste drücken.", "Press."), PAIRS[2]]
    pairs = [pairs[0], pairs[1], pairs[0], pairs[2], pairs[1]]
    memory = PairMemory(model, PAIRS[:5])
    mixture = Mixture(model, memory, PerSentence(1, 2, 8), DistanceAwareCombiner(tau=1e4))
    translator = Translator(model, mixture, Decoding(**DECODING))
    online = OnlineTranslator(translator, memory, pairs)
    texts = online.translate([pair.src for pair in pairs]).texts
    assert len(memory) == 5
    for number, pair in enumerate(pairs):
        fresh = PairMemory(model, [*PAIRS[:5], *pairs[:number]])
        mixture = Mixture(model, fresh, PerSentence(1, 2, 8), DistanceAwareCombiner(tau=1e4))
        assert texts[number] == Translator(model, mixture, Decoding(**DECODING)).translate([pair.src]).texts[0]
    assert texts[0] != pairs[0].tgt and texts[2] == pairs[0].tgt
    assert texts[1] != pairs[1].tgt and texts[4] == pairs[1].tgt
    assert online.translate([pair.src for pair in pairs]).texts == texts
    with pytest.raises(ValueError, match="expected the same in the same order"):
        online.translate(["Eine Taste drücken."])


@pytest.fixture
def config(domain: Domain) -> dict[str, Any]:
    return {
        "backbone": {"model": str(domain.model), "device": "cpu"},
        "translation_memory": {"path": str(domain.root / "data" / "train.jsonl")},
        "decoding": DECODING,
        **PARTS,
    }


def test_translate_and_evaluate_need_no_datastore(domain: Domain, config: dict[str, Any], tmp_path: Path) -> None:
    grid = {"k": [1, 2], "finalists": 2, "others": {"sentences": [1, 4]}}
    evaluation = config | {
        "test": {"path": domain.root / "data" / "test.jsonl"},
        "tuning": {"validation": {"path": domain.root / "data" / "validation.jsonl"}, "grid": grid},
        "repeats": 1,
        "online": True,
        "out": tmp_path / "out",
    }
    run(evaluate.evaluate, "--config", write_config(tmp_path / "evaluate.yaml", evaluation))
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert list(results["systems"]) == ["base", "knn", "knn_online"]
    assert results["systems"]["knn"]["bleu"] > results["systems"]["base"]["bleu"]
    assert results["tuning"]["tried"] == 2 * 2 * 4 * 3  # k, pairs, τ and T scaled to the distances found
    taus = {finalist["settings"]["combiner"]["init_args"]["tau"] for finalist in results["tuning"]["finalists"]}
    assert not taus & {40.0, 100.0}
    assert results["settings"]["datastore"] is None and results["index"] is None
    assert results["settings"]["translation_memory"]["sentences"] == 80
    written = tmp_path / "out" / "translate.yaml"
    content = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert content["retriever"] == results["tuning"]["best"]["retriever"] and "datastore" not in content
    translator = load_translator(written)
    expected = translator.translate(domain.sources("test")).texts
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in domain.sources("test")), encoding="utf-8")
    run(translate.translate, "--config", written, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == expected
    assert isinstance(translator.mixture, Mixture)
    token = explain(translator.mixture, domain.sources("test")[0], translator.decoding).tokens[0]
    source = token.neighbors[0].context.pair.src
    assert SequenceMatcher(None, source, domain.sources("test")[0]).ratio() > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"datastore": "somewhere"}, "expected one of them"),
        ({"retriever": None}, "no retriever is given"),
        ({"retriever": {"class_path": PARTS["retriever"]["class_path"], "init_args": {"sentences": 0}}}, "sentences"),
        ({"retriever": {"class_path": PARTS["retriever"]["class_path"], "init_args": {"candidates": 3}}}, "candidates"),
        ({"combiner": {"class_path": PARTS["combiner"]["class_path"], "init_args": {"tau": 0}}}, "tau is 0"),
    ],
)
def test_what_does_not_fit_is_refused(
    changes: dict[str, Any], message: str, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_config(tmp_path / "translate.yaml", config | changes)
    expect_error(capsys, translate.translate, "--config", path, "--input", path, expected=message)


def test_memories_and_retrievers_that_do_not_fit_are_named(model: KeyedModel, marian_folder: Path) -> None:
    stored = build_memory(model, ["Datei"], ["File"])
    with pytest.raises(ValueError, match="expected a PairMemory"):
        Mixture(model, stored, PerSentence(), DistanceAwareCombiner())
    memory = PairMemory(model, PAIRS)
    with pytest.raises(ValueError, match="expected the model that translates"):
        Mixture(load_model(str(marian_folder), device="cpu"), memory, PerSentence(), DistanceAwareCombiner())
    with pytest.raises(ValueError, match="expected the retriever PerSentence"):
        KnnSettings().open(model, memory).neighbors(
            Step(torch.zeros(1, model.key_size), torch.zeros(1, 2), torch.zeros(1))
        )
    with pytest.raises(ValueError, match="first is 31, expected 0 to 30"):
        memory.keep(31)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"translation_memory": None}, "datastore is missing"),
        ({"others": {"b": {"model": "m", "datastore": "d"}}}, "expected none beside a translation_memory"),
    ],
)
def test_evaluate_refuses_what_it_cannot_compare(
    changes: dict[str, Any], message: str, config: dict[str, Any], domain: Domain, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    content = config | {"test": {"path": domain.root / "data" / "test.jsonl"}, "out": tmp_path / "out"} | changes
    path = write_config(tmp_path / "evaluate.yaml", content)
    expect_error(capsys, evaluate.evaluate, "--config", path, expected=message)


def test_online_needs_a_memory_that_learns(domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {
        "backbone": {"model": str(domain.model), "device": "cpu"}, "datastore": str(domain.root / "store"),
        "test": {"path": domain.root / "data" / "test.jsonl"}, "out": tmp_path / "out", "online": True,
    }  # fmt: skip
    path = write_config(tmp_path / "evaluate.yaml", content)
    expect_error(capsys, evaluate.evaluate, "--config", path, expected="expected a translation_memory")
