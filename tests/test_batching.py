"""Batches: the token budget holds, every item comes once, ranks share the work, and Lightning gets a new order."""

import random
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from scratch_model import ModelShape, init_model
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.data.batching import TokenBudgetSampler, divisible_batches, token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.splits import write_splits
from lightning_knnmt.training import Schedule, TranslationModule
from lightning_knnmt.training.datamodule import TokenizedPairs, TranslationDataModule


def lengths_of(seed: int, items: int = 200, longest: int = 60) -> list[int]:
    rng = random.Random(seed)
    return [rng.randint(1, longest) for _ in range(items)]


def epoch(sampler: TokenBudgetSampler, number: int = 0) -> list[list[int]]:
    sampler.set_epoch(number)
    return list(sampler)


@pytest.mark.parametrize("max_tokens", [1, 30, 100, 10_000])
@pytest.mark.parametrize("seed", [1, 2])
def test_only_a_single_long_item_exceeds_the_budget(seed: int, max_tokens: int) -> None:
    lengths = lengths_of(seed)
    batches = token_budget_batches(lengths, max_tokens)
    assert sorted(item for batch in batches for item in batch) == list(range(len(lengths)))
    for batch in batches:
        padded = len(batch) * max(lengths[item] for item in batch)
        assert padded <= max_tokens or len(batch) == 1


def test_budget_batches_pad_less_than_batches_in_the_order_of_the_corpus() -> None:
    lengths = lengths_of(3)
    batches = token_budget_batches(lengths, 300)
    padded = sum(len(batch) * max(lengths[item] for item in batch) for batch in batches)
    size = -(-len(lengths) // len(batches))
    naive = [lengths[start : start + size] for start in range(0, len(lengths), size)]
    assert sum(lengths) <= padded < 1.1 * sum(lengths) < sum(len(batch) * max(batch) for batch in naive)


def test_a_budget_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="max_tokens is 0, expected 1 or more"):
        token_budget_batches([1, 2], 0)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("max_tokens", [61, 400, 100_000])
def test_ranks_are_disjoint_of_equal_length_and_see_every_item_once(
    world_size: int, shuffle: bool, max_tokens: int
) -> None:
    lengths = lengths_of(4)
    samplers = [TokenBudgetSampler(lengths, max_tokens, shuffle, 5, rank, world_size) for rank in range(world_size)]
    for number in (0, 1):
        ranks = [epoch(sampler, number) for sampler in samplers]
        assert sorted(item for rank in ranks for batch in rank for item in batch) == list(range(len(lengths)))
        assert [len(rank) for rank in ranks] == [len(sampler) for sampler in samplers] == [len(ranks[0])] * world_size
        for batch in (batch for rank in ranks for batch in rank):
            assert len(batch) * max(lengths[item] for item in batch) <= max_tokens


def test_items_that_fill_a_batch_each_are_divided_as_far_as_they_go() -> None:
    ranks = [epoch(TokenBudgetSampler([9, 8, 7, 6, 5], 4, True, 1, rank, 2)) for rank in range(2)]
    items = [item for rank in ranks for batch in rank for item in batch]
    assert ([len(rank) for rank in ranks], len(set(items))) == ([2, 2], 4)
    left_out = {
        item
        for number in range(30)
        for item in set(range(5))
        - {i for rank in range(2) for b in epoch(TokenBudgetSampler([9] * 5, 4, True, 1, rank, 2), number) for i in b}
    }
    assert left_out == set(range(5))  # another one each epoch


def test_divisible_batches_keeps_items_and_their_order() -> None:
    batches = token_budget_batches(lengths_of(6), 500)
    for parts in range(1, 9):
        divided = divisible_batches(batches, parts)
        assert len(divided) % parts == 0
        assert [item for batch in divided for item in batch] == [item for batch in batches for item in batch]
        assert all(divided)


def test_each_epoch_has_an_order_of_its_own_and_each_seed_too() -> None:
    lengths = lengths_of(7)
    sampler = TokenBudgetSampler(lengths, 200)
    first, second, again = epoch(sampler, 0), epoch(sampler, 1), epoch(sampler, 0)
    assert first == again != second
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in second}
    assert len(first) == len(second) == len(sampler)
    assert epoch(TokenBudgetSampler(lengths, 200, seed=2)) != first


def test_without_shuffling_the_order_is_by_length_in_every_epoch() -> None:
    lengths = lengths_of(8)
    sampler = TokenBudgetSampler(lengths, 200, shuffle=False)
    assert epoch(sampler, 0) == epoch(sampler, 3)
    assert [lengths[item] for batch in epoch(sampler) for item in batch] == sorted(lengths)


@pytest.mark.parametrize(
    ("lengths", "rank", "world_size", "message"),
    [
        ([], 0, 1, "0 items cannot be divided among 1 processes"),
        ([3, 4], 0, 3, "2 items cannot be divided among 3 processes, expected an item or more for each"),
        ([3, 4], 2, 2, "rank is 2, expected 0 to world_size - 1 = 1"),
    ],
)
def test_impossible_divisions_are_refused(lengths: list[int], rank: int, world_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenBudgetSampler(lengths, 10, rank=rank, world_size=world_size)


# ---- the data module in a Lightning Trainer

PAIRS = [
    Pair(
        f"Datei {number} öffnen" + " und schließen" * (number % 4), f"open file {number}" + " and close" * (number % 4)
    )
    for number in range(24)
]
MAX_TOKENS = 90


class Recorder(TranslationModule):
    """Notes the batches that it is trained and validated with."""

    def __init__(self, model: str, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.trained: dict[int, list[Batch]] = {}
        self.validated: list[Batch] = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        self.trained.setdefault(self.current_epoch, []).append(batch)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self.validated.append(batch)
        super().validation_step(batch, batch_idx)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    shape = ModelShape(vocabulary=60, d_model=16, encoder_layers=1, decoder_layers=1, heads=2, ffn=16, positions=64)
    init_model([text for pair in PAIRS for text in (pair.src, pair.tgt)], folder, shape)
    return str(folder)


@pytest.fixture
def data(tmp_path: Path) -> TranslationDataModule:
    write_splits(tmp_path, {"train": PAIRS[:20], "validation": PAIRS[20:], "test": []}, {})
    return TranslationDataModule(tmp_path / "train.jsonl", tmp_path / "validation.jsonl", MAX_TOKENS, 2 * MAX_TOKENS)


def trainer(folder: Path, **options: int) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        default_root_dir=folder,
        **options,
    )


def rows(batches: list[Batch]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Source and target tokens of every pair, without padding."""
    found = []
    for batch in batches:
        assert batch.labels is not None
        for ids, mask, labels in zip(batch.input_ids, batch.attention_mask, batch.labels, strict=True):
            found.append((tuple(ids[mask.bool()].tolist()), tuple(labels[labels >= 0].tolist())))
    return found


def test_the_trainer_sees_every_pair_once_an_epoch_in_a_new_order(
    tmp_path: Path, model: str, data: TranslationDataModule
) -> None:
    module = Recorder(BackboneConfig(model), Schedule(lr=1e-3, warmup_steps=1))
    trainer(tmp_path, max_epochs=2).fit(module, data)
    tokenizer = module.backbone.tokenizer
    expected = [(tuple(tokenizer(pair.src)["input_ids"]), tuple(tokenizer(pair.tgt)["input_ids"])) for pair in PAIRS]
    first, second = rows(module.trained[0]), rows(module.trained[1])
    assert sorted(first) == sorted(second) == sorted(expected[:20])
    assert first != second
    assert sorted(rows(module.validated)) == sorted(expected[20:] * 2)
    for batch in module.trained[0] + module.trained[1]:
        assert batch.labels is not None
        assert max(batch.input_ids.numel(), batch.labels.numel()) <= MAX_TOKENS
        assert torch.equal(batch.attention_mask == 0, batch.input_ids == module.backbone.pad_id)


def test_validation_alone_needs_no_training_file(tmp_path: Path, model: str, data: TranslationDataModule) -> None:
    data.files["train"].unlink()
    module = Recorder(BackboneConfig(model), Schedule(lr=1e-3, warmup_steps=1))
    trainer(tmp_path).validate(module, data, verbose=False)
    assert len(rows(module.validated)) == 4


def test_an_empty_split_is_named(tmp_path: Path, model: str, data: TranslationDataModule) -> None:
    data.files["validation"].write_text("")
    module = Recorder(BackboneConfig(model), Schedule(lr=1e-3, warmup_steps=1))
    with pytest.raises(
        ValueError, match=r"validation is .*validation\.jsonl, which is empty; expected one pair or more"
    ):
        trainer(tmp_path, max_steps=1).fit(module, data)


def test_the_length_of_a_pair_is_that_of_its_longer_side() -> None:
    pairs = TokenizedPairs([[1, 2, 3], [4]], [[5], [6, 7]])
    assert (pairs.lengths, len(pairs), pairs[1]) == ([3, 2], 2, ([4], [6, 7]))


def test_padding_of_the_builders_batches_is_under_5_percent() -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(np.round(rng.lognormal(3.0, 0.7, 40_000)), 2, 250).astype(int)  # mean 25, as sentences are
    batches = token_budget_batches(lengths.tolist(), 8192)
    padded = sum(len(batch) * max(lengths[item] for item in batch) for batch in batches)
    assert 1 - lengths.sum() / padded < 0.05
    assert max(len(batch) * max(lengths[item] for item in batch) for batch in batches) <= 8192
