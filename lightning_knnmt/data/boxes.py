"""Batches of sentence pairs that are similar on both sides."""

import heapq
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int64]


def box_batches(src: Sequence[int], tgt: Sequence[int], max_tokens: int, max_padding: float) -> list[list[int]]:
    """Group sentence pairs so that no batch exceeds `max_tokens` on either side and little of all batches is padding.

    All pairs begin as one group. The group where it saves most padding is cut in two, by source or by target length,
    until padding is rare enough; groups beyond the budget are then divided evenly. Sorting by one length alone leaves
    the other side ragged: 8 to 22 % of all tokens were padding on the corpora of configs/data/.

    Args:
        src: Source tokens of each pair.
        tgt: Target tokens of each pair.
        max_tokens: Budget of a batch on either side, padding counted; a longer pair makes a batch of its own.
        max_padding: Largest share of all batches' tokens, both sides counted, that may be padding.

    Returns:
        Pair numbers of each batch, the longest pairs first.

    >>> box_batches([5, 9, 5, 1], [7, 1, 7, 2], max_tokens=20, max_padding=0.1)
    [[0, 2], [1], [3]]
    """
    lengths = np.array([src, tgt], np.int64)  # [side, pair]
    batches = []
    for rows in _boxes(lengths, max_padding):
        rows = rows[np.lexsort((rows, lengths[0, rows], lengths[1, rows]))]
        most = max(1, max_tokens // int(lengths[:, rows].max()))
        batches += np.array_split(rows, -(-len(rows) // most))
    batches.sort(key=lambda rows: (-lengths[:, rows].max(1).sum(), rows[0]))
    return [rows.tolist() for rows in batches]


def padded_tokens(lengths: NDArray[np.int64], rows: Rows) -> int:
    """Tokens of a batch on both sides, padding counted; `lengths` has the shape (2, pairs)."""
    return len(rows) * int(lengths[:, rows].max(1).sum())


def _boxes(lengths: NDArray[np.int64], max_padding: float) -> list[Rows]:
    """The fewest groups, found greedily, of which no more than a share is padding."""
    tokens, number = int(lengths.sum()), 0
    boxes: list[tuple[int, int, Rows, Rows]] = []  # a heap of (-saved by cutting, number, first half, second half)
    done = []
    padded = 0

    def add(rows: Rows) -> None:
        nonlocal number, padded
        padded += padded_tokens(lengths, rows)
        if len(rows) < 2:
            done.append(rows)
            return
        cost, first, second = min((_cut(lengths, rows, side) for side in (0, 1)), key=lambda cut: cut[0])
        heapq.heappush(boxes, (cost - padded_tokens(lengths, rows), number, first, second))
        number += 1

    if lengths.shape[1]:
        add(np.arange(lengths.shape[1]))
    while boxes and padded - tokens > max_padding * padded:
        _, _, first, second = heapq.heappop(boxes)
        padded -= padded_tokens(lengths, np.concatenate([first, second]))
        add(first)
        add(second)
    return done + [np.concatenate([first, second]) for _, _, first, second in boxes]


def _cut(lengths: NDArray[np.int64], rows: Rows, side: int) -> tuple[int, Rows, Rows]:
    """The cut between shorter and longer sentences of a side that leaves the fewest tokens, and those tokens."""
    rows = rows[np.lexsort((rows, lengths[1 - side, rows], lengths[side, rows]))]
    own, other = lengths[side, rows], lengths[1 - side, rows]
    shorter = np.arange(1, len(rows))  # pairs in the first part
    first = shorter * (own[:-1] + np.maximum.accumulate(other)[:-1])
    second = (len(rows) - shorter) * (own[-1] + np.maximum.accumulate(other[::-1])[::-1][1:])
    cost = first + second
    best = int(cost.argmin())
    return int(cost[best]), rows[: best + 1], rows[best + 1 :]
