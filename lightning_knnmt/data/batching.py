"""Batches of similar length under a token budget."""

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler


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
    if max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens}, expected 1 or more")
    batches: list[list[int]] = []
    for item in sorted(range(len(lengths)), key=lambda item: lengths[item]):
        if not batches or lengths[item] * (len(batches[-1]) + 1) > max_tokens:
            batches.append([])
        batches[-1].append(item)
    return batches


class TokenBudgetSampler(Sampler[list[int]]):
    """Token-budget batches in a new random order each epoch, divided among ranks.

    Every rank gets the same number of batches; what is left over rotates with the epoch.

    Args:
        lengths: Tokens of each item.
        max_tokens: Budget of a batch, padding counted.
        shuffle: Draw anew each epoch; else shortest first.
        seed: Seed of the draw, the same on all ranks.
        rank: This process's number.
        world_size: How many processes there are.
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
        self.lengths, self.max_tokens, self.shuffle, self.seed = lengths, max_tokens, shuffle, seed
        self.rank, self.world_size = rank, world_size
        self.epoch = 0
        if len(self) == 0:
            raise ValueError(
                f"{len(lengths)} items make fewer batches of max_tokens={max_tokens} than there are processes "
                f"({world_size}); lower max_tokens or use fewer processes"
            )

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order the next iteration has (called by Lightning)."""
        self.epoch = epoch

    def _batches(self) -> list[list[int]]:
        if not self.shuffle:
            return token_budget_batches(self.lengths, self.max_tokens)
        rng = random.Random(f"{self.seed}/{self.epoch}")
        order = list(range(len(self.lengths)))
        rng.shuffle(order)  # items of one length meet others each epoch
        batches = token_budget_batches([self.lengths[item] for item in order], self.max_tokens)
        rng.shuffle(batches)
        return [[order[item] for item in batch] for batch in batches]

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches()[self.rank :: self.world_size][: len(self)])

    def __len__(self) -> int:
        return len(token_budget_batches(self.lengths, self.max_tokens)) // self.world_size
