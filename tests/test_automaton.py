"""RetoMaton: pointers followed in place of searches, against a plain loop in numpy."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_perplexity import TEST, evaluate, folder, windows_of  # noqa: F401, the folder is a fixture
from tiny_models import ENGLISH, GERMAN
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain
from lightning_knnmt.evaluation.perplexity import perplexities
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.gates import ConfidenceGate
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.pooled import PooledMemory
from lightning_knnmt.knn.retrievers.automaton import Automaton
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import open_memory
from lightning_knnmt.timing import Spans

D, K, VALUES = 4, 12, 3
LENGTHS = [9, 1, 14, 30, 6]
TEXTS = [11, 7, 1]


def store(seed: int = 0) -> RamMemory:
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(sum(LENGTHS), D, generator=generator)
    values = torch.randint(0, VALUES, (len(keys),), generator=generator)
    return RamMemory(keys, values, [Pair("", "")] * len(LENGTHS), LENGTHS)


def rows_of_texts(seed: int = 1) -> Step:
    """All tokens of some texts in a teacher-forced pass, texts one after the other."""
    generator = torch.Generator().manual_seed(seed)
    rows = sum(TEXTS)
    sentence = torch.arange(len(TEXTS)).repeat_interleave(torch.tensor(TEXTS))
    position = torch.cat([torch.arange(length) for length in TEXTS])
    previous = torch.randint(0, VALUES, (rows,), generator=generator)
    queries = torch.randn(rows, D, generator=generator)
    return Step(queries, torch.randn(rows, 9, generator=generator), sentence, previous=previous, position=position)


def opened(memory: Any, min_pointers: int, texts: int = len(TEXTS)) -> Automaton:
    retriever = Automaton(k=K, min_pointers=min_pointers)
    retriever.bind(None, memory)  # type: ignore[arg-type]
    retriever.begin(Batch(torch.zeros(texts, 1, dtype=torch.long), torch.ones(texts, 1, dtype=torch.long)))
    return retriever


def by_hand(memory: RamMemory, step: Step, min_pointers: int) -> tuple[list[list[int]], int]:
    """The neighbors of each row, token by token, and how many rows searched."""
    keys, values = memory.keys.double().numpy(), memory.values.numpy()
    ends = set(np.cumsum(LENGTHS) - 1)
    found: list[list[int]] = []
    searched, last = 0, []
    assert step.previous is not None and step.position is not None
    for query, token, position in zip(step.queries.double().numpy(), step.previous, step.position, strict=True):
        distances = ((keys - query) ** 2).sum(1)
        pointers = [entry + 1 for entry in last if values[entry] == token and entry not in ends] if position else []
        if len(pointers) < min_pointers:
            pointers = list(np.argsort(distances)[:K])
            searched += 1
        last = sorted(pointers, key=lambda entry: distances[entry])
        found.append([int(entry) for entry in last])
    return found, searched


@pytest.mark.parametrize("min_pointers", [1, 2, 3, K, K + 1])
def test_neighbors_are_those_of_a_loop_over_tokens(min_pointers: int) -> None:
    memory, step = store(), rows_of_texts()
    expected, searched = by_hand(memory, step, min_pointers)
    retriever = opened(memory, min_pointers)
    found = retriever(step)
    for row, entries in enumerate(expected):
        assert found.ids[row].tolist() == entries + [-1] * (K - len(entries))
        near = ((memory.keys[entries] - step.queries[row]) ** 2).sum(1)
        torch.testing.assert_close(found.distances[row, : len(entries)], near)
        assert found.values[row, : len(entries)].equal(memory.values[entries])
        assert found.distances[row, len(entries) :].isinf().all()
    assert retriever.followed == len(step) - searched
    assert (retriever.followed > 0) == (min_pointers < 4)


def test_a_token_at_a_time_finds_what_a_whole_text_does() -> None:
    memory, step = store(), rows_of_texts()
    whole = opened(memory, 2)(step)
    retriever = opened(memory, 2)
    assert step.position is not None
    for position in range(max(TEXTS)):
        rows = (step.position == position).nonzero().flatten()
        assert retriever(step.rows(rows)).ids.equal(whole.ids[rows])


def test_more_pointers_than_neighbors_is_searching_always() -> None:
    memory, step = store(), rows_of_texts()
    always = WholeStore(k=K)
    always.bind(None, memory)  # type: ignore[arg-type]
    for one, other in zip(opened(memory, K + 1)(step).parts, always(step).parts, strict=True):
        assert one.equal(other)


def test_after_a_row_that_did_not_search_there_is_nothing_to_follow() -> None:
    memory, step = store(), rows_of_texts()
    retriever = opened(memory, 1)
    assert step.position is not None
    for position in range(0, max(TEXTS), 2):
        retriever(step.rows((step.position == position).nonzero().flatten()))
        assert retriever.followed == 0


def test_the_entry_after_another_is_told_within_a_text_only(tmp_path: Path, backbone: KeyedModel) -> None:
    with build_store(backbone, tmp_path / "store", corpus_pairs(12), shard_pairs=2) as datastore:
        build_index(datastore, IndexConfig("Flat"))
        places = [(c.number, c.position) for c in map(datastore.context, range(len(datastore)))]
    with open_memory(tmp_path / "store") as memory:
        following = memory.following(torch.arange(len(places))).tolist()
        assert memory.following(torch.tensor([[-1]])).tolist() == [[-1]]
    for entry, (number, position) in enumerate(places):
        goes_on = entry + 1 < len(places) and places[entry + 1] == (number, position + 1)
        assert following[entry] == (entry + 1 if goes_on else -1)
    assert -1 in following[:-1]


# ---- with models


def mixture(model: KeyedModel, memory: Any, min_pointers: int, gate: Any = None) -> Mixture:
    return Mixture(model, memory, Automaton(6, min_pointers=min_pointers), FixedCombiner(0.5, 20.0), gate)


@pytest.mark.parametrize("loop", ["own", "generate"])
def test_greedy_decoding_follows_the_tokens_that_it_produced(backbone: KeyedModel, loop: Any) -> None:
    """Its translations, teacher-forced once more by `explain`, have the neighbors that decoding had."""
    memory, decoding = build_memory(backbone, GERMAN, ENGLISH), Decoding(beams=1, max_new_tokens=12, loop=loop)
    mixed = mixture(backbone, memory, 1)
    searches = []
    for source in GERMAN[:3]:
        translator, spans = Translator(backbone, mixed, decoding), Spans()
        labels = translator.generate(backbone.batch([source]), spans)[:, 1:]
        searches.append((spans.counts["search"], spans.counts["followed"]))
        batch = backbone.batch([source])
        batch.labels = labels
        keys, logits = backbone.keys_and_logits(batch)
        tokens, place = labels[0], torch.arange(labels.shape[1])
        step = Step(keys[0], logits[0], torch.zeros_like(tokens), previous=tokens.roll(1), position=place)
        mixed.begin(batch)
        again = Spans()
        best = mixed(step, again).argmax(1)
        ended = (tokens == backbone.tokenizer.eos_token_id).cumsum(0) > 0
        assert best[~ended][:-1].equal(tokens[~ended][:-1])
        assert (again.counts["search"], again.counts["followed"]) == searches[-1]
        assert explain(mixed, source, decoding).text == translator.translate([source]).texts[0]
    assert sum(followed for _, followed in searches) > 0 < sum(search for search, _ in searches)


def test_perplexity_counts_the_searches_that_are_left(folder: Path) -> None:  # noqa: F811
    model = load_model(str(folder / "model"), device="cpu")
    with open_memory(folder / "store") as memory:
        systems = {str(least): mixture(model, memory, least) for least in (1, 2, 7)}
        systems["gated"] = mixture(model, memory, 1, ConfidenceGate(0.0))
        systems["knn"] = Mixture(model, memory, WholeStore(6), FixedCombiner(0.5, 20.0))
        found = perplexities(model, systems, windows_of(TEST), max_tokens=64)
    assert found["7"].searches == found["knn"].searches == 1
    assert found["7"].log_likelihood == pytest.approx(found["knn"].log_likelihood, abs=1e-6)
    assert 0 < found["1"].searches <= found["2"].searches <= 1 and found["1"].searches < 1
    assert found["gated"].searches == 0


def test_evaluate_lm_reports_pointers_beside_searching(folder: Path) -> None:  # noqa: F811
    evaluate(folder, min_pointers=[1, 99])
    table = (folder / "out" / "results.md").read_text(encoding="utf-8")
    assert "| pointers_1 " in table and "| pointers_99 " in table
    with pytest.raises(ValueError, match=r"min_pointers is \[1\] with the retriever Given, expected WholeStore"):
        evaluate(folder, min_pointers=[1], retriever=Given())


class Given(Retriever):
    """A retriever of another kind."""

    def __call__(self, step: Step) -> Any:
        raise NotImplementedError


def refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_what_does_not_fit_is_refused(backbone: KeyedModel) -> None:
    memory = store()
    refused(lambda: Automaton(min_pointers=0), "min_pointers is 0, expected 1 or more")
    refused(lambda: opened(PooledMemory({"a": memory}), 1), "PooledMemory does not tell the entry after another")
    unknown = Step(torch.zeros(1, D), torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))
    refused(lambda: opened(memory, 1)(unknown), "the step has no tokens before its rows, which Automaton follows")
    mixed = mixture(backbone, build_memory(backbone, GERMAN, ENGLISH), 1)
    refused(lambda: Translator(backbone, mixed, Decoding(beams=2, max_new_tokens=9)), "beams is 2, but the retriever")
