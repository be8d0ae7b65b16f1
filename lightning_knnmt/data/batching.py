"""Batches of similar length under a token budget."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

from lightning_knnmt.checks import check_at_least


def token_budget_batches(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Group items into batches of which none exceeds `max_tokens`, padding counted.

    Items are taken in the order of their lengths, so that padding is rare.

    Args:
        lengths: Tokens of each item.
        max_tokens: Budget; an item longer than that makes a batch of its own.

    Returns:
        Item numbers of each batch, shortest items first.

    >>> token_budget_batches([5, 1, 2, 4], max_tokens=8)
    [[1, 2], [3], [0]]
    """
    check_at_least(1, max_tokens=max_tokens)
    batches: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: lengths[item]):
        if not batches or lengths[item] * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(item)
    return batches


def divisible_batches(batches: list[list[int]], parts: int) -> list[list[int]]:
    """Halve the batches of most items until their number is a multiple of `parts`.

    Where only single items are left to halve, the last batches are left out instead.

    >>> divisible_batches([[1, 2, 4], [3], [0]], parts=2)
    [[1], [2, 4], [3], [0]]
    """
    batches = list(batches)
    for _ in range(-len(batches) % parts):
        largest = max(range(len(batches)), key=lambda number: len(batches[number]), default=None)
        if largest is None or len(batches[largest]) < 2:
            break
        batch = batches[largest]
        batches[largest : largest + 1] = [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
    return batches[: len(batches) - len(batches) % parts]


class TokenBudgetSampler(Sampler[list[int]]):
    """Token-budget batches in a new random order each epoch, divided among ranks.

    Every rank gets the same number of batches, and the ranks together every item once (but see `divisible_batches`).

    Args:
        lengths: Tokens of each item.
        max_tokens: Budget of a batch, padding counted.
        shuffle: Draw anew each epoch; else shortest first.
        seed: Seed of the draw, the same on all ranks.
        rank: This process's number.
        world_size: How many processes there are.

    Raises:
        ValueError: There are fewer items than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        shuffle: bool = True,
        seed: int = 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if len(lengths) < world_size:
            raise ValueError(
                f"{len(lengths)} items cannot be divided among {world_size} processes, expected an item or more for "
                "each; use more data or fewer processes"
            )
        if not 0 <= rank < world_size:
            raise ValueError(f"rank is {rank}, expected 0 to world_size - 1 = {world_size - 1}")
        self.lengths, self.max_tokens, self.shuffle, self.seed = lengths, max_tokens, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        # the same in every epoch, since only items of one length change places
        self._length = len(self._divided(lengths)) // world_size

    @property
    def sampler(self) -> "TokenBudgetSampler":
        """Itself, since Lightning tells the epoch to a batch sampler's `sampler` only."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has (called by Lightning)."""
        self.epoch = epoch

    def _divided(self, lengths: Sequence[int]) -> list[list[int]]:
        return divisible_batches(token_budget_batches(lengths, self.max_tokens), self.world_size)

    def _batches(self) -> list[list[int]]:
        if not self.shuffle:
            return self._divided(self.lengths)
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)  # items of one length meet others each epoch
        batches = self._divided([self.lengths[item] for item in order])
        rng.shuffle(batches)
        return [[order[item] for item in batch] for batch in batches]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self.rank :: self.world_size])

    def __len__(self) -> int:
        return self._length
