"""Gates in decoding: what they close is the plain model, token for token, and costs no search."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_models import GERMAN
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.comparison import run_systems
from lightning_knnmt.evaluation.report import system_json
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.gates import ConfidenceGate, Gate
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def memory(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatastoreMemory]:
    with build_store(marian, tmp_path_factory.mktemp("gates") / "store", corpus_pairs(20), 15) as store:
        build_index(store, IndexConfig("Flat"))
        yield DatastoreMemory(store, open_index(store))


def translator(marian: KeyedModel, memory: DatastoreMemory, gate: Gate | None) -> Translator:
    mixture = Mixture(marian, memory, WholeStore(k=6), FixedCombiner(0.5, 50.0), gate)
    return Translator(marian, mixture, Decoding(3, 3, 10))


def test_a_closed_gate_is_the_plain_model_and_an_open_one_is_none(marian: KeyedModel, memory: DatastoreMemory) -> None:
    plain = Translator(marian, decoding=Decoding(3, 3, 10)).translate(GERMAN)
    closed, opened, none = (
        translator(marian, memory, gate).translate(GERMAN) for gate in (ConfidenceGate(0.0), ConfidenceGate(1.0), None)
    )
    assert closed.texts == plain.texts != none.texts
    assert opened.texts == none.texts
    assert closed.spans.counts["search"] == 0 < closed.spans.counts["gate"]
    assert opened.spans.counts["search"] == opened.spans.counts["gate"] == none.spans.counts["search"]
    assert "gate" not in none.spans.counts


def test_rows_are_searched_where_the_model_is_less_sure_than_the_threshold(
    marian: KeyedModel, memory: DatastoreMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest: list[float] = []
    ask = ConfidenceGate.forward

    def heard(self: ConfidenceGate, step: Step) -> torch.Tensor:
        largest.extend(step.logits.double().softmax(1).amax(1).tolist())
        return ask(self, step)

    monkeypatch.setattr(ConfidenceGate, "forward", heard)
    found = translator(marian, memory, ConfidenceGate(0.4)).translate(GERMAN)
    assert found.spans.counts["gate"] == found.spans.counts["mix"] == len(largest)
    assert 0 < found.spans.counts["search"] == sum(share < 0.4 for share in largest) < len(largest)


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_outside_of_0_to_1_is_refused(threshold: float) -> None:
    with pytest.raises(ValueError, match=rf"threshold is {threshold}, expected 0 to 1"):
        ConfidenceGate(threshold)


def test_rows_that_search_are_counted_among_all_rows(marian: KeyedModel, memory: DatastoreMemory) -> None:
    for gate, least, most in ((None, 1.0, 1.0), (ConfidenceGate(0.4), 0.01, 0.99), (ConfidenceGate(0.0), 0.0, 0.0)):
        found = run_systems({"knn": translator(marian, memory, gate)}, [Pair(text, "") for text in GERMAN], repeats=1)
        assert least <= found["knn"].speed.searches <= most
        assert system_json(found["knn"])["searches_per_token"] == pytest.approx(found["knn"].speed.searches, abs=1e-4)
    plain = run_systems({"base": Translator(marian, decoding=Decoding(3, 3, 10))}, [Pair(GERMAN[0], "")], repeats=1)
    assert plain["base"].speed.searches == 0
