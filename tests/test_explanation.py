"""Explanations against what decoding saw."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, TINY_FAMILIES
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.decoding import Decoding
from lightning_knnmt.evaluation.explanation import explain, explanation_lines, mark_token
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.memory import KnnSearch, KnnSettings
from lightning_knnmt.knn.retrievers.whole_store import DatastoreRetriever, Neighbors

SETTINGS = KnnSettings(k=4, lambda_=0.6, temperature=8.0, nprobe=1)
SOURCES = [pair.src for pair in corpus_pairs(4, seed=9)]


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def search(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[KnnSearch]:
    with build_store(marian, tmp_path_factory.mktemp("explanation") / "store", corpus_pairs(30), 60) as store:
        build_index(store, IndexConfig("Flat"))
        yield KnnSearch(marian, store)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Neighbors]:
    """The result of every search."""
    found: list[Neighbors] = []
    retrieve = DatastoreRetriever.retrieve

    def recorded(self: DatastoreRetriever, queries: torch.Tensor) -> Neighbors:
        found.append(retrieve(self, queries))
        return found[-1]

    monkeypatch.setattr(DatastoreRetriever, "retrieve", recorded)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_neighbors_are_those_that_greedy_decoding_saw(source: str, search: KnnSearch, seen: list[Neighbors]):
    decoding = Decoding(beams=1, max_new_tokens=9)
    texts = search.translator(SETTINGS, decoding).translate([source]).texts
    steps = len(seen)
    explanation = explain(search, SETTINGS, decoding, source, shown=4)
    assert explanation.text == texts[0]
    assert len(explanation.tokens) == steps > 2
    store = search.datastore
    for step, (token, neighbors) in enumerate(zip(explanation.tokens, seen[:steps], strict=True)):
        expected = [store.context(int(entry)) for entry in neighbors.ids[0]]
        assert [neighbor.context for neighbor in token.neighbors] == expected, step
        distances = [neighbor.distance for neighbor in token.neighbors]
        np.testing.assert_allclose(distances, neighbors.distances[0], rtol=1e-3, atol=1e-2)
        pieces = search.backbone.tokenizer.convert_ids_to_tokens(neighbors.values[0].tolist())
        assert [neighbor.token for neighbor in token.neighbors] == pieces


@pytest.mark.parametrize("beams", [1, 3])
def test_probabilities_are_the_mixture_of_the_model_and_the_shares(beams: int, search: KnnSearch):
    for source in SOURCES:
        for token in explain(search, SETTINGS, Decoding(beams, max_new_tokens=9), source, shown=4).tokens:
            knn = sum(neighbor.share for neighbor in token.neighbors if neighbor.token == token.token)
            expected = SETTINGS.lambda_ * knn + (1 - SETTINGS.lambda_) * token.model_probability
            assert token.probability == pytest.approx(expected, abs=1e-5)


def test_shares_are_those_of_all_neighbors_however_many_are_shown(search: KnnSearch):
    decoding = Decoding(beams=2, max_new_tokens=9)
    whole, first = (explain(search, SETTINGS, decoding, SOURCES[0], shown=shown) for shown in (4, 2))
    for all_four, two in zip(whole.tokens, first.tokens, strict=True):
        assert sum(neighbor.share for neighbor in all_four.neighbors) == pytest.approx(1, abs=1e-5)
        assert sum(neighbor.share for neighbor in two.neighbors) <= 1 + 1e-6
        assert two.neighbors == all_four.neighbors[:2]
        assert [n.distance for n in all_four.neighbors] == sorted(n.distance for n in all_four.neighbors)


def test_an_explained_translation_is_that_of_the_translator(search: KnnSearch):
    decoding = Decoding(beams=3, max_new_tokens=9, options={"length_penalty": 0.5})
    for source in SOURCES:
        texts = search.translator(SETTINGS, decoding).translate([source]).texts
        explanation = explain(search, SETTINGS, decoding, source)
        assert explanation.text == texts[0]
        ids = search.backbone.tokenizer.convert_tokens_to_ids([token.token for token in explanation.tokens])
        assert search.backbone.tokenizer.decode(ids, skip_special_tokens=True) == texts[0]


def test_a_store_smaller_than_k_shows_what_there_is(marian: KeyedModel, tmp_path: Path):
    with build_store(marian, tmp_path / "store", corpus_pairs(1)) as store:
        build_index(store, IndexConfig("Flat"))
        tokens = explain(KnnSearch(marian, store), KnnSettings(k=64), Decoding(1, 1, 5), SOURCES[0], shown=64).tokens
        assert {len(token.neighbors) for token in tokens} == {len(store)}


def test_the_token_in_brackets_is_the_neighbors_token(search: KnnSearch):
    for source in SOURCES:
        for token in explain(search, SETTINGS, Decoding(1, 1, 9), source).tokens:
            for neighbor in token.neighbors:
                inside = neighbor.marked.split("[")[1].split("]")[0]
                assert inside == (neighbor.token.removeprefix("▁") or neighbor.token)


def test_marks_stand_at_the_stored_position(search: KnnSearch):
    tokenizer = search.backbone.tokenizer
    store = search.datastore
    for entry in range(len(store)):
        context = store.context(entry)
        ids = search.backbone.tokenize([context.pair.src], [context.pair.tgt])[1][0]
        assert ids[context.position] == store.values[entry]
        marked = mark_token(tokenizer, ids, context.position)
        assert marked.count("[") == marked.count("]") == 1
        before, rest = marked.split("[")
        token, after = rest.split("]")
        if context.position == len(ids) - 1:
            assert marked == f"{context.pair.tgt} [{tokenizer.eos_token}]"
        elif token == "▁":  # a word's beginning by itself
            assert (before + after.lstrip()).replace(" ", "") == context.pair.tgt.replace(" ", "")
        else:
            assert before + token + after == context.pair.tgt
            assert before.replace(" ", "") == "".join(tokenizer.convert_ids_to_tokens(ids[: context.position])).replace(
                "▁", ""
            )
        if context.position == 0:
            assert before == ""


@pytest.mark.parametrize("name", list(TINY_FAMILIES))
def test_marks_lose_no_text_in_any_family(name: str, tiny_folder_of: Callable[[str], Path]):
    backbone = load_model(str(tiny_folder_of(name)), device="cpu", **TINY_FAMILIES[name].languages)
    text = ENGLISH[0]
    ids = backbone.tokenize([text], [text])[1][0]
    special = set(backbone.tokenizer.all_special_ids)
    for position, token in enumerate(ids):
        marked = mark_token(backbone.tokenizer, ids, position)
        before, rest = marked.split("[", 1)
        inside, after = rest.split("]", 1)
        kept = before + after if token in special else before + inside + after
        cleaned = backbone.tokenizer.decode(ids, skip_special_tokens=True)
        strip = str.maketrans("", "", " ▁")
        assert kept.replace("</w>", "").translate(strip) == cleaned.translate(strip), (position, marked)
    end = mark_token(backbone.tokenizer, ids, len(ids) - 1)
    assert end.endswith(f"[{backbone.tokenizer.convert_ids_to_tokens(ids[-1])}]")


def test_lines_hold_probability_share_distance_and_source(search: KnnSearch):
    explanation = explain(search, SETTINGS, Decoding(1, 1, 5), SOURCES[0], shown=2)
    lines = list(explanation_lines(explanation))
    assert len(lines) == 3 * len(explanation.tokens)
    token, neighbor = explanation.tokens[0], explanation.tokens[0].neighbors[0]
    assert lines[0] == f"  {token.token}  p={token.probability:.2f} (model alone {token.model_probability:.2f})"
    assert lines[1].startswith(f"      {neighbor.share:.2f}  d={neighbor.distance:.1f}  {neighbor.marked}")
    assert lines[1].endswith(neighbor.context.pair.src)


def test_a_mark_in_a_long_text_keeps_what_surrounds_it(search: KnnSearch):
    tokenizer = search.backbone.tokenizer
    text = " ".join(pair.tgt for pair in corpus_pairs(12))
    ids = tokenizer(text).input_ids
    for position in range(len(ids)):
        whole, cut = mark_token(tokenizer, ids, position), mark_token(tokenizer, ids, position, 20)
        assert len(cut) < 40 + 12
        for part in cut.removeprefix("… ").removesuffix(" …").split("…"):
            assert part.strip() in whole
