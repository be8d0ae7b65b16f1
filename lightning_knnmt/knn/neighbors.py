"""What a search finds."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Neighbors:
    """The K nearest stored contexts of R rows, nearest first.

    Attributes:
        distances: Shape (R, K), smaller is nearer; +inf where there is no neighbor. Squared L2 if the memory's metric
            is `l2`; a similarity enters as −d: −⟨q, k⟩ for `ip`, −cos(q, k) for `cos`.
        values: Target-token ids, shape (R, K); 0 where there is no neighbor.
        ids: Entry numbers in the memory, shape (R, K); −1 where there is no neighbor.
        weights: How many entries each neighbor stands for, where entries were merged, shape (R, K); None: one each.
    """

    distances: Tensor
    values: Tensor
    ids: Tensor
    weights: Tensor | None = None

    def first(self, k: int) -> "Neighbors":
        """The k nearest only.

        >>> Neighbors(torch.tensor([[1.0, 2.0]]), torch.tensor([[7, 8]]), torch.tensor([[0, 3]])).first(1).values
        tensor([[7]])
        """
        return self._map(lambda part: part[:, :k])

    def rows(self, chosen: Tensor) -> "Neighbors":
        """Those of some rows, chosen by a mask of shape (R,) or by their numbers."""
        return self._map(lambda part: part[chosen])

    def gather(self, order: Tensor) -> "Neighbors":
        """Some neighbors of each row by their places, shape (R, K')."""
        return self._map(lambda part: part.gather(1, order))

    @property
    def found(self) -> Tensor:
        """Whether a row has any neighbor, shape (R,)."""
        return (self.ids >= 0).any(1)

    def spread(self, searched: Tensor) -> "Neighbors":
        """The same neighbors for the rows that searched; the other rows have none.

        Args:
            searched: Mask of all rows, shape (R',), True for the R rows that these neighbors belong to.
        """
        shape = len(searched), self.ids.shape[1]
        wide = Neighbors(
            self.distances.new_full(shape, torch.inf), self.values.new_zeros(shape), self.ids.new_full(shape, -1),
            None if self.weights is None else self.weights.new_ones(shape),
        )  # fmt: skip
        for all_rows, rows in zip(wide.parts, self.parts, strict=True):
            all_rows[searched] = rows
        if wide.weights is not None and self.weights is not None:
            wide.weights[searched] = self.weights
        return wide

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor]:
        """Distances, values and ids."""
        return self.distances, self.values, self.ids

    def to(self, device: torch.device | str) -> "Neighbors":
        """The same neighbors on another device."""
        return self._map(lambda part: part.to(device))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "Neighbors":
        distances, values, ids = map(change, self.parts)
        return Neighbors(distances, values, ids, None if self.weights is None else change(self.weights))


def no_neighbors(rows: int, k: int, device: torch.device | str = "cpu") -> Neighbors:
    """Nothing found, for so many rows.

    >>> no_neighbors(1, 2).ids
    tensor([[-1, -1]])
    """
    nothing = torch.empty(0, k, device=device)
    searched = torch.zeros(rows, dtype=torch.bool, device=device)
    return Neighbors(nothing, nothing.long(), nothing.long()).spread(searched)
