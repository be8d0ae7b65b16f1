"""Greedy merging of near entries with the same token (Martins et al., arXiv 2204.12608)."""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

AT_ONCE = 65536  # entries


def merge_greedily(
    neighbors: NDArray[np.int64], values: NDArray[np.int32], weights: NDArray[np.int32]
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Merge entries that have the same token and are among each other's nearest.

    Each entry in turn, unless it was merged itself, takes in those of its neighbors that are still there and have taken
    in none.

    Args:
        neighbors: The K nearest others of N entries, −1 where there are fewer, shape (N, K).
        values: Their tokens, shape (N,).
        weights: How many entries each stands for, shape (N,).

    Returns:
        Which entries are left, and how many each then stands for, shape (N,) both.

    >>> merge_greedily(np.array([[1], [0], [1]]), np.array([5, 5, 5]), np.ones(3, np.int32))
    (array([ True, False,  True]), array([2, 1, 1], dtype=int32))
    """
    kept, merged = np.ones(len(values), bool), weights.copy()
    alone = np.ones(len(values), bool)  # has taken in none
    for entry, near in _mutual(neighbors, values):
        if kept[entry] and kept[near] and alone[near]:
            kept[near], alone[entry] = False, False
            merged[entry] += merged[near]
    merged[~kept] = weights[~kept]
    return kept, merged


def _mutual(neighbors: NDArray[np.int64], values: NDArray[np.int32]) -> Iterator[tuple[int, int]]:
    """Pairs of entries that can be merged, in the order of the entries and of their neighbors."""
    for first in range(0, len(values), AT_ONCE):
        entries = np.arange(first, min(first + AT_ONCE, len(values)))
        near = neighbors[entries]  # [entries, K]
        same = (near >= 0) & (values[near] == values[entries][:, None])
        back = (neighbors[near] == entries[:, None, None]).any(2)  # [entries, K], whether it is among theirs
        row, column = np.nonzero(same & back)
        yield from zip(entries[row].tolist(), near[row, column].tolist(), strict=True)
