"""Sentences that enter a search as others leave it, and the parts of a step that are made for few rows."""

import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_models import ENGLISH, GERMAN

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.row_decoder import reordered
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.batch_size import SENTENCES, BatchSize, evenly
from lightning_knnmt.decoding.projection import Projection
from lightning_knnmt.decoding.search import Waiting
from lightning_knnmt.decoding.top import top_columns
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.knn.step import Step

TEXTS = [*GERMAN, *(f"{one} {other}" for one, other in itertools.pairwise(GERMAN))]
NOTHING = RamMemory(torch.empty(0, 24), torch.empty(0, dtype=torch.long), [], [])


@pytest.fixture(scope="module")
def firefox(tiny_folder_of: Callable[[str], Path]) -> KeyedModel:
    return load_model(str(tiny_folder_of("firefox")), device="cpu")


class Ending(PlainModel):
    """Lets sentence s end behind 1 + s % 5 tokens; keeps the sentences of the rows of each step."""

    changes_nothing = False

    def __init__(self, eos: int) -> None:
        self.eos, self.steps, self.lengths = eos, [], Counter[int]()

    def mixed(self, step: Step, spans: object = None, widen: object = None) -> Step:
        self.steps.append(step.sentence.tolist())
        self.lengths.update(set(step.sentence.tolist()))
        ends = [row for row, number in enumerate(step.sentence.tolist()) if self.lengths[number] > 1 + number % 5]
        step.logits[:, self.eos] = -torch.inf
        step.logits[ends, self.eos] = 100.0
        return step


@pytest.mark.parametrize("key_type", ["decoder_output", "ffn_input"])
@pytest.mark.parametrize("beams", [1, 3])
def test_sentences_that_enter_later_are_translated_as_alone(
    tiny_folder_of: Callable[[str], Path], beams: int, key_type: str
) -> None:
    model = load_model(str(tiny_folder_of("firefox")), device="cpu", key_type=key_type)
    memory = build_memory(model, GERMAN, ENGLISH)
    for mixture in (PlainModel(), KnnSettings(k=4, lambda_=0.5, temperature=20.0).open(model, memory)):
        alone = [Translator(model, mixture, Decoding(beams, 1, 14)).translate([text]).texts[0] for text in TEXTS]
        for batch_size in (3, 8, 100):
            together = Translator(model, mixture, Decoding(beams, batch_size, 14)).translate(TEXTS)
            assert together.texts == alone
        assert len(set(alone)) > len(TEXTS) // 2


@pytest.mark.parametrize("beams", [1, 3])
def test_as_one_leaves_another_enters(firefox: KeyedModel, beams: int) -> None:
    ending = Ending(firefox.tokenizer.eos_token_id)
    Translator(firefox, ending, Decoding(beams, 4, 14)).translate(TEXTS)  # type: ignore[arg-type]
    decoded = [set(rows) for rows in ending.steps]
    assert all(len(rows) == beams * len(numbers) for rows, numbers in zip(ending.steps, decoded, strict=True))
    assert ending.lengths == {number: 2 + number % 5 for number in range(len(TEXTS))}
    last_enters = min(
        step for step, numbers in enumerate(decoded) if set().union(*decoded[: step + 1]) == set(range(len(TEXTS)))
    )
    assert all(len(numbers) == 4 for numbers in decoded[: last_enters + 1])
    assert len(decoded) < sum(ending.lengths.values()) / 4 + 5


class Prepared(Retriever):
    """Finds nothing; what it prepares for a batch is that of all its sentences."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def begin(self, batch: Batch) -> None:
        self.sizes.append(len(batch))

    def __call__(self, step: Step) -> Neighbors:
        assert int(step.sentence.max()) < self.sizes[-1]
        nothing = step.queries.new_full((len(step), 1), torch.inf)
        return Neighbors(nothing, torch.zeros_like(nothing, dtype=torch.long), torch.full_like(nothing, -1).long())


def test_what_a_retriever_prepares_for_is_decoded_together(firefox: KeyedModel) -> None:
    mixture = Mixture(firefox, NOTHING, Prepared(), FixedCombiner(0.5))
    assert mixture.prepares
    found = Translator(firefox, mixture, Decoding(2, 5, 14)).translate(TEXTS).texts
    assert isinstance(mixture.retriever, Prepared)
    assert mixture.retriever.sizes == [5] * (len(TEXTS) // 5) + ([len(TEXTS) % 5] if len(TEXTS) % 5 else [])
    assert found == Translator(firefox, PlainModel(), Decoding(2, 5, 14)).translate(TEXTS).texts


def test_no_sentence_enters_where_all_rows_stand_at_one_position(tiny_folder_of: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_folder_of("marian")), device="cpu")
    decoder = model.stepwise(1)
    decoder.enter(model.batch(GERMAN[:2]))
    with pytest.raises(ValueError, match="sentences are decoded already, expected none"):
        decoder.enter(model.batch(GERMAN[:1]))


def test_a_batch_that_is_larger_than_the_room_enters_alone(firefox: KeyedModel) -> None:
    batch, numbers = firefox.batch(GERMAN[:3]), torch.arange(3)
    waiting = Waiting(iter([(batch, numbers), (batch, numbers)]), 2)
    assert len(list(waiting.entering(0))) == 1
    assert waiting.left
    assert not list(waiting.entering(1))
    assert len(list(waiting.entering(0))) == 1
    assert not waiting.left


@pytest.mark.parametrize("columns", [1, 5, 127, 128, 4096, 4100])
@pytest.mark.parametrize("k", [1, 4, 8])
def test_the_largest_of_blocks_are_the_largest_of_all(columns: int, k: int) -> None:
    logits = torch.randn(7, columns, generator=torch.Generator().manual_seed(columns))
    logits[0] = torch.arange(columns)
    logits[1] = -torch.inf
    logits[2, -1] = 9.0
    k = min(k, columns)
    values, places = top_columns(logits, k)
    assert values.equal(logits.topk(k).values)
    assert logits.gather(1, places).equal(values)
    assert all(len(set(row)) == k for row in places.tolist())


def test_the_first_of_equal_logits_is_taken_as_argmax_does() -> None:
    logits = torch.randint(3, (50, 1300), generator=torch.Generator().manual_seed(1)).float()
    assert top_columns(logits, 1)[1][:, 0].equal(logits.argmax(1))


@pytest.mark.parametrize("rows", [[0, 1, 2, 3], [0, 0, 2, 3], [3, 2, 1, 0], [1, 3], [0, 1, 2, 3, 3, 0]])
def test_rows_are_reordered_in_place_or_anew(rows: list[int]) -> None:
    state = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    expected = state[rows].clone()
    assert reordered(state, torch.tensor(rows)).equal(expected)


def test_weights_that_training_has_changed_are_projected_with(tiny_folder_of: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_folder_of("marian")), device="cpu")
    projection = Projection(model)
    states = torch.randn(3, model.key_size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        before = projection(states)
        assert torch.allclose(before, model.project(states), atol=1e-5)
        weights = model.projection_weights()
        assert weights is not None
        weights[0].mul_(2)
        assert torch.allclose(projection(states), model.project(states), atol=1e-5)
        assert not torch.allclose(projection(states), before, atol=1e-2)


def trials(rates: dict[int, float], left: int) -> tuple[list[int], int]:
    """The numbers that are tried, where each has a rate, and what is best in the end."""
    measured, tried = BatchSize(), []
    while (size := measured.next(left)) is not None:
        tried.append(size)
        left -= SENTENCES * size
        measured.record(round(1000 * rates[size]), 1000.0)
    return tried, measured.best


def test_numbers_of_sentences_are_doubled_until_that_is_no_faster() -> None:
    assert trials({8: 5.0, 16: 7.0, 32: 9.0, 64: 8.0}, 10_000) == ([8, 8, 16, 32, 64], 32)
    assert trials({8: 5.0, 16: 4.0}, 10_000) == ([8, 8, 16], 8)
    assert trials({8 << power: power + 1.0 for power in range(6)}, 10_000)[1] == 256
    assert trials({8: 5.0, 16: 7.0}, 150) == ([8, 8, 16], 32)  # nothing is known of 32
    assert trials({}, 31) == ([], 32)


def test_texts_of_a_trial_are_spread_over_all_lengths() -> None:
    tried, rest = evenly(range(100), 25)
    assert tried == list(range(0, 100, 4))
    assert sorted(tried + rest) == list(range(100))
    assert evenly([4, 2], 2) == ([4, 2], [])


@pytest.mark.parametrize("family", ["firefox", "marian"])
@pytest.mark.parametrize("beams", [1, 2])
def test_a_measured_batch_size_changes_no_translation(
    tiny_folder_of: Callable[[str], Path], family: str, beams: int
) -> None:
    model = load_model(str(tiny_folder_of(family)), device="cpu")
    texts = [f"{number} {text}" for number in range(8) for text in TEXTS]
    fixed = Translator(model, decoding=Decoding(beams, 32, 6)).translate(texts)
    measured = Translator(model, decoding=Decoding(beams, "auto", 6))
    found = measured.translate(texts)
    assert (found.texts, found.tokens, found.cut) == (fixed.texts, fixed.tokens, fixed.cut)
    assert found.spans.counts["beams"] > 0
    assert measured.translate(texts).texts == fixed.texts


def test_a_batch_size_in_words_is_refused() -> None:
    with pytest.raises(ValueError, match="batch_size is 'many', expected auto or a number"):
        Decoding(batch_size="many")  # type: ignore[arg-type]
