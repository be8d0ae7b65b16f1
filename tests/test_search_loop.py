"""The own greedy and beam search against Hugging Face's `generate`, token for token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import ENGLISH, GERMAN
from torch import Tensor

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.options import search_options
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.gates import ConfidenceGate
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.knn.step import Step, log_sum_exp
from lightning_knnmt.timing import Spans

OPTIONS: list[tuple[int, dict[str, Any]]] = [
    (1, {}),
    (1, {"no_repeat_ngram_size": 2}),
    (2, {"length_penalty": 2.0}),
    (4, {}),
    (4, {"early_stopping": True}),
    (3, {"early_stopping": "never", "length_penalty": 0.5}),
    (4, {"min_new_tokens": 6, "repetition_penalty": 1.3}),
]


def sequences(model: KeyedModel, mixture: Mixture | PlainModel, loop: Any, beams: int, options: Any) -> Tensor:
    decoding = Decoding(beams=beams, max_new_tokens=14, options=options, loop=loop)
    return Translator(model, mixture, decoding).generate(model.batch(GERMAN), Spans())


def mixtures(model: KeyedModel) -> list[Mixture | PlainModel]:
    memory = build_memory(model, GERMAN, ENGLISH)
    sure = Mixture(model, memory, WholeStore(3), FixedCombiner(0.4, 30.0), ConfidenceGate(0.5))
    return [PlainModel(), KnnSettings(k=4, lambda_=0.5, temperature=20.0).open(model, memory), sure]


@pytest.mark.parametrize(("beams", "options"), OPTIONS)
def test_every_family_gives_the_sequences_of_generate(
    tiny_backbone: KeyedModel, beams: int, options: dict[str, Any]
) -> None:
    for mixture in mixtures(tiny_backbone):
        theirs, ours = (sequences(tiny_backbone, mixture, loop, beams, options) for loop in ("generate", "own"))
        assert ours.tolist() == theirs.tolist()


def test_finished_sentences_leave_the_batch(backbone: KeyedModel) -> None:
    """Rows that search are those of sentences that are still decoded."""
    (mixture,) = mixtures(backbone)[1:2]
    rows = {}
    for loop in ("generate", "own"):
        spans = Spans()
        decoding = Decoding(beams=1, max_new_tokens=30, loop=loop)
        found = Translator(backbone, mixture, decoding).generate(backbone.batch(GERMAN), spans)
        rows[loop] = spans.counts["search"]
    ends = backbone.tokenizer.eos_token_id
    lengths = [row.index(ends) if ends in row else len(row) - 1 for row in found[:, :].tolist()]
    assert rows["own"] == sum(lengths)
    assert rows["generate"] == len(GERMAN) * (found.shape[1] - 1) > rows["own"]


@pytest.mark.parametrize("options", [{"do_sample": True}, {"num_beam_groups": 2}, {"top_k": 5}, {"use_cache": False}])
def test_what_only_generate_can_do_is_left_to_it(backbone: KeyedModel, options: dict[str, Any]) -> None:
    rules = backbone.search_rules()
    assert rules is not None
    assert search_options(rules[0], options, 2, 9) is None
    assert search_options(rules[0], {"length_penalty": 0.7}, 2, 9) is not None


def test_a_model_without_steps_is_decoded_by_generate(
    tiny_folder_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(str(tiny_folder_of("marian")), device="cpu")
    expected = sequences(model, PlainModel(), "own", 2, {})
    monkeypatch.setattr(type(model), "search_rules", KeyedModel.search_rules)
    assert sequences(model, PlainModel(), "own", 2, {}).tolist() == expected.tolist()


@pytest.mark.parametrize("lambda_", [0.0, 0.3, 0.999, 1.0])
def test_the_normaliser_of_a_mixture_follows_from_that_of_the_model(lambda_: float) -> None:
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(5, 40, generator=generator)
    distances = 30 * torch.rand(5, 6, generator=generator).sort(1).values
    values = torch.randint(0, 9, (5, 6), generator=generator)
    distances[2], ids = torch.inf, torch.arange(30).view(5, 6)
    ids[2] = -1
    mixed = FixedCombiner(lambda_, 10.0).mix(
        Step(torch.zeros(5, 2), logits, torch.zeros(5)), Neighbors(distances, values, ids)
    )
    torch.testing.assert_close(mixed.log_normalizer, log_sum_exp(mixed.logits), rtol=1e-5, atol=1e-5)
    assert knn_log_weights(distances, 10.0)[2].isinf().all()


def test_an_unknown_loop_is_refused() -> None:
    with pytest.raises(ValueError, match="loop is 'mine', expected one of own, generate"):
        Decoding(loop="mine")  # type: ignore[arg-type]
