"""Batches with little padding on both sides hold every pair once and keep the budget."""

import numpy as np
import pytest

from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.boxes import box_batches


def ragged(pairs: int, seed: int = 0) -> tuple[list[int], list[int]]:
    """Source and target lengths of pairs of which many differ from side to side."""
    rng = np.random.default_rng(seed)
    src = 1 + rng.geometric(0.05, pairs)
    tgt = np.maximum(1, src + rng.integers(-5, 12, pairs))
    return src.tolist(), tgt.tolist()


def padding(batches: list[list[int]], *sides: list[int]) -> float:
    """Share of all batches' tokens that is padding, counted by making the padded rows."""
    rows = [[[1] * side[row] for row in batch] for batch in batches for side in sides]
    padded = [row + [0] * (max(map(len, block)) - len(row)) for block in rows for row in block]
    return 1 - sum(map(sum, padded)) / sum(map(len, padded))


@pytest.mark.parametrize("pairs", [1, 2, 50, 3000])
@pytest.mark.parametrize("max_padding", [0.01, 0.04, 0.2])
def test_padding_is_below_the_wanted_share_and_every_pair_is_in_one_batch_within_the_budget(
    pairs: int, max_padding: float
) -> None:
    src, tgt = ragged(pairs)
    batches = box_batches(src, tgt, 500, max_padding)
    assert padding(batches, src, tgt) <= max_padding
    assert sorted(row for batch in batches for row in batch) == list(range(pairs))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(max(src[row], tgt[row]) for row in batch) <= 500
    longest = [max(src[row] for row in batch) + max(tgt[row] for row in batch) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_less_padding_takes_more_batches_but_not_many_more_than_sorting_by_length() -> None:
    src, tgt = ragged(20_000)
    by_length = token_budget_batches([max(pair) for pair in zip(src, tgt, strict=True)], 4096)
    counts = [len(box_batches(src, tgt, 4096, share)) for share in (0.02, 0.04, 0.08)]
    assert counts == sorted(counts, reverse=True)
    assert padding(by_length, src, tgt) > 0.05
    assert counts[1] < 2 * len(by_length)


def test_a_pair_beyond_the_budget_is_alone_and_no_pairs_make_no_batches() -> None:
    assert box_batches([3, 90, 3], [3, 2, 3], 10, 0.1) == [[1], [0, 2]]
    assert box_batches([], [], 10, 0.1) == []
