"""Exact nearest neighbors by torch: of all rows in the same keys, and of each sentence's rows in keys of its own."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.metric import Metric, seen_by

EXTRA_CANDIDATES = 8  # candidates beyond K, among which rounding cannot hide one of the K nearest


def nearest_keys(queries: Tensor, keys: Tensor, norms: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """Distances (see `Neighbors`) and numbers of the nearest of N keys, the smaller number first if equally near.

    Args:
        queries: Shape (R, D), float32.
        keys: Shape (N, D), float32.
        norms: Their squared norms, shape (N,), for squared L2; None: for inner products.
        k: K, no more than N.

    Returns:
        Shapes (R, K).

    >>> import torch
    >>> keys = torch.tensor([[0.0, 3.0], [1.0, 0.0]])
    >>> nearest_keys(torch.zeros(1, 2), keys, keys.square().sum(1), 2)
    (tensor([[1., 9.]]), tensor([[1, 0]]))
    """
    products = queries @ keys.T  # [R, N]
    rough = -products if norms is None else norms - 2 * products  # distances but for the queries' own norms
    numbers = rough.topk(min(len(keys), k + EXTRA_CANDIDATES), largest=False).indices.sort(1).values
    found, asked = keys[numbers], queries[:, None]  # [R, K + EXTRA_CANDIDATES, D], [R, 1, D]
    exact = -(found * asked).sum(2) if norms is None else (found - asked).square().sum(2)
    exact, order = exact.sort(dim=1, stable=True)
    return exact[:, :k], numbers.gather(1, order)[:, :k]


def distances_to(queries: Tensor, keys: Tensor, metric: Metric = "l2") -> Tensor:
    """Distances (see `Neighbors`) of each row to K keys of its own.

    Args:
        queries: Shape (R, D).
        keys: Shape (R, K, D).
        metric: By what keys are near.

    Returns:
        Shape (R, K).

    >>> import torch
    >>> distances_to(torch.tensor([[1.0, 0.0]]), torch.tensor([[[1.0, 2.0], [1.0, 0.0]]]))
    tensor([[4., 0.]])
    """
    keys, asked = seen_by(keys, metric), seen_by(queries.detach().float(), metric)[:, None]
    return (keys - asked).square().sum(2) if metric == "l2" else -(keys * asked).sum(2)


@dataclass(frozen=True)
class Entries:
    """N entries, those of one sentence's own datastore.

    Attributes:
        keys: Shape (N, D), float32.
        values: Target-token ids, shape (N,).
        ids: Entry numbers in the memory, shape (N,).
    """

    keys: Tensor
    values: Tensor
    ids: Tensor

    @cached_property
    def norms(self) -> Tensor:
        """Squared norms of the keys, shape (N,)."""
        return self.keys.square().sum(1)

    def __len__(self) -> int:
        return len(self.keys)


def nearest_entries(
    queries: Tensor, sentence: Tensor, entries: Sequence[Entries], k: int, metric: Metric = "l2"
) -> Neighbors:
    """The K nearest of each row among the entries of its sentence.

    Args:
        queries: Shape (R, D).
        sentence: Shape (R,).  # [row -> sentence]
        entries: Of each of the B sentences, on the rows' device; there may be fewer than K, or none.
        k: K.
        metric: By what entries are near; for `cos` keys and queries have unit norm.
    """
    found = no_neighbors(len(queries), k, queries.device)
    queries = queries.detach().float()
    for number, rows in rows_by_sentence(sentence):
        own = entries[number]
        if nearest := min(k, len(own)):
            distances, places = nearest_keys(queries[rows], own.keys, own.norms if metric == "l2" else None, nearest)
            found.distances[rows, :nearest] = distances
            found.values[rows, :nearest] = own.values[places]
            found.ids[rows, :nearest] = own.ids[places]
    return found


def rows_by_sentence(sentence: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Each sentence that has rows, and their numbers.

    Args:
        sentence: Shape (R,), in any order.  # [row -> sentence]

    >>> import torch
    >>> list(rows_by_sentence(torch.tensor([2, 0, 2])))
    [(0, tensor([1])), (2, tensor([0, 2]))]
    """
    order = sentence.argsort(stable=True)
    numbers, counts = sentence[order].unique_consecutive(return_counts=True)
    yield from zip(numbers.tolist(), order.split(counts.tolist()), strict=True)
