"""Explanations against what decoding saw."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from tiny_models import ENGLISH, TINY_FAMILIES
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain, explanation_lines, mark_token
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory

SETTINGS = KnnSettings(k=4, lambda_=0.6, temperature=8.0, nprobe=1)
SOURCES = [pair.src for pair in corpus_pairs(4, seed=9)]


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def memory(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatastoreMemory]:
    with build_store(marian, tmp_path_factory.mktemp("explanation") / "store", corpus_pairs(30), 6) as store:
        build_index(store, IndexConfig("Flat"))
        build_index(store, IndexConfig("IVF2,PQ2x4fs", name="coarse"))
        yield DatastoreMemory(store, open_index(store))


@pytest.fixture(scope="module")
def mixture(marian: KeyedModel, memory: DatastoreMemory) -> Mixture:
    return SETTINGS.open(marian, memory)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Neighbors]:
    """The result of every search."""
    found: list[Neighbors] = []
    retrieve = WholeStore.__call__

    def recorded(self: WholeStore, step: Step) -> Neighbors:
        found.append(retrieve(self, step))
        return found[-1]

    monkeypatch.setattr(WholeStore, "__call__", recorded)
    return found


@pytest.mark.parametrize("source", SOURCES)
def test_neighbors_are_those_that_greedy_decoding_saw(source: str, mixture: Mixture, seen: list[Neighbors]):
    decoding = Decoding(beams=1, max_new_tokens=9)
    texts = Translator(mixture.model, mixture, decoding).translate([source]).texts
    steps = len(seen)
    explanation = explain(mixture, source, decoding, shown=4)
    assert explanation.text == texts[0]
    assert len(explanation.tokens) == steps > 2
    store = mixture.memory
    for step, (token, neighbors) in enumerate(zip(explanation.tokens, seen[:steps], strict=True)):
        expected = [store.context(int(entry)) for entry in neighbors.ids[0]]
        assert [neighbor.context for neighbor in token.neighbors] == expected, step
        distances = [neighbor.distance for neighbor in token.neighbors]
        np.testing.assert_allclose(distances, neighbors.distances[0], rtol=1e-3, atol=1e-2)
        pieces = mixture.model.tokenizer.convert_ids_to_tokens(neighbors.values[0].tolist())
        assert [neighbor.token for neighbor in token.neighbors] == pieces


@pytest.mark.parametrize("beams", [1, 3])
def test_probabilities_are_the_mixture_of_the_model_and_the_shares(beams: int, mixture: Mixture):
    for source in SOURCES:
        for token in explain(mixture, source, Decoding(beams, max_new_tokens=9), shown=4).tokens:
            knn = sum(neighbor.share for neighbor in token.neighbors if neighbor.token == token.token)
            expected = SETTINGS.lambda_ * knn + (1 - SETTINGS.lambda_) * token.model_probability
            assert token.probability == pytest.approx(expected, abs=1e-5)


def test_shares_are_those_of_all_neighbors_however_many_are_shown(mixture: Mixture):
    decoding = Decoding(beams=2, max_new_tokens=9)
    whole, first = (explain(mixture, SOURCES[0], decoding, shown=shown) for shown in (4, 2))
    for all_four, two in zip(whole.tokens, first.tokens, strict=True):
        assert sum(neighbor.share for neighbor in all_four.neighbors) == pytest.approx(1, abs=1e-5)
        assert sum(neighbor.share for neighbor in two.neighbors) <= 1 + 1e-6
        assert two.neighbors == all_four.neighbors[:2]
        assert [n.distance for n in all_four.neighbors] == sorted(n.distance for n in all_four.neighbors)


def test_an_explained_translation_is_that_of_the_translator(mixture: Mixture):
    decoding = Decoding(beams=3, max_new_tokens=9, options={"length_penalty": 0.5})
    for source in SOURCES:
        texts = Translator(mixture.model, mixture, decoding).translate([source]).texts
        explanation = explain(mixture, source, decoding)
        assert explanation.text == texts[0]
        ids = mixture.model.tokenizer.convert_tokens_to_ids([token.token for token in explanation.tokens])
        assert mixture.model.tokenizer.decode(ids, skip_special_tokens=True) == texts[0]


def test_a_store_smaller_than_k_shows_what_there_is(marian: KeyedModel, tmp_path: Path):
    with build_store(marian, tmp_path / "store", corpus_pairs(1)) as store:
        build_index(store, IndexConfig("Flat"))
        found = DatastoreMemory(store, open_index(store))
        tokens = explain(KnnSettings(k=64).open(marian, found), SOURCES[0], Decoding(1, 1, 5), shown=64).tokens
        assert {len(token.neighbors) for token in tokens} == {len(store)}


def test_the_token_in_brackets_is_the_neighbors_token(mixture: Mixture):
    for source in SOURCES:
        for token in explain(mixture, source, Decoding(1, 1, 9)).tokens:
            for neighbor in token.neighbors:
                inside = neighbor.marked.split("[")[1].split("]")[0]
                assert inside == (neighbor.token.removeprefix("▁") or neighbor.token)


def test_marks_stand_at_the_stored_position(mixture: Mixture):
    tokenizer = mixture.model.tokenizer
    store = mixture.memory
    for entry in range(len(store)):
        context = store.context(entry)
        ids = mixture.model.tokenize([context.pair.src], [context.pair.tgt]).tgt[0]
        assert ids[context.position] == store.datastore.values[entry]
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
    ids = backbone.tokenize([text], [text]).tgt[0]
    special = set(backbone.tokenizer.all_special_ids)
    for position, token in enumerate(ids):
        marked = mark_token(backbone.tokenizer, ids, position)
        before, rest = marked.split("[", 1)
        inside, after = rest.split("]", 1)
        kept = before + after if token in special else before + inside + after
        cleaned = backbone.tokenizer.decode(ids, skip_special_tokens=True)
        strip = str.maketrans("", "", " ▁Ġ")
        assert kept.replace("</w>", "").translate(strip) == cleaned.translate(strip), (position, marked)
    end = mark_token(backbone.tokenizer, ids, len(ids) - 1)
    assert end.endswith(f"[{backbone.tokenizer.convert_ids_to_tokens(ids[-1])}]")


def test_lines_hold_probability_share_distance_and_source(mixture: Mixture):
    explanation = explain(mixture, SOURCES[0], Decoding(1, 1, 5), shown=2)
    lines = list(explanation_lines(explanation))
    assert len(lines) == 3 * len(explanation.tokens)
    token, neighbor = explanation.tokens[0], explanation.tokens[0].neighbors[0]
    assert lines[0] == f"  {token.token}  p={token.probability:.2f} (model alone {token.model_probability:.2f})"
    assert lines[1].startswith(f"      {neighbor.share:.2f}  d={neighbor.distance:.1f}  {neighbor.marked}")
    assert lines[1].endswith(neighbor.context.pair.src)


def test_a_mark_in_a_long_text_keeps_what_surrounds_it(mixture: Mixture):
    tokenizer = mixture.model.tokenizer
    text = " ".join(pair.tgt for pair in corpus_pairs(12))
    ids = tokenizer(text).input_ids
    for position in range(len(ids)):
        whole, cut = mark_token(tokenizer, ids, position), mark_token(tokenizer, ids, position, 20)
        assert len(cut) < 40 + 12
        for part in cut.removeprefix("… ").removesuffix(" …").split("…"):
            assert part.strip() in whole


def test_a_search_that_scores_again_is_explained_as_it_decodes(
    marian: KeyedModel, memory: DatastoreMemory, seen: list[Neighbors]
) -> None:
    coarse = DatastoreMemory(memory.datastore, open_index(memory.datastore, "coarse"))
    for source in SOURCES:
        seen.clear()
        mixture = KnnSettings(4, 0.6, 8.0, nprobe=1, rescore=20).open(marian, coarse)
        steps = explain(mixture, source, Decoding(1, 1, 9), shown=4).tokens
        decoded = seen[:-1]  # the last is that of explaining
        assert len(decoded) == len(steps) > 2
        for token, neighbors in zip(steps, decoded, strict=True):
            assert [n.context for n in token.neighbors] == [coarse.context(int(entry)) for entry in neighbors.ids[0]]
            np.testing.assert_allclose(
                [n.distance for n in token.neighbors], neighbors.distances[0], rtol=1e-3, atol=1e-4
            )
        by_codes = explain(KnnSettings(4, 0.6, 8.0, nprobe=1).open(marian, coarse), source, Decoding(1, 1, 9), shown=4)
        assert by_codes.tokens[0].neighbors[0].distance != pytest.approx(steps[0].neighbors[0].distance, rel=1e-3)
