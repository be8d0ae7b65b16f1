"""How the model's prediction and the neighbors' are mixed."""

import math
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from lightning_knnmt.knn.probability import mix_logits, neighbor_log_probs
from lightning_knnmt.knn.retrievers.whole_store import Neighbors


class Combiner(Protocol):
    """Mixes logits with neighbors."""

    @property
    def needs_neighbors(self) -> bool:
        """Whether neighbors can change anything."""
        ...

    def __call__(self, logits: Tensor, neighbors: Neighbors, in_place: bool = False) -> Tensor:
        """Logits of the mixture, shape (R, V), from logits of shape (R, V); `in_place` allows to overwrite those."""
        ...


@dataclass(frozen=True)
class FixedCombiner:
    """p = λ p_kNN + (1 − λ) p_NMT with the same λ and T at every step (arXiv 2010.00710, eq. 3).

    Attributes:
        lambda_: λ, the neighbors' share, in [0, 1].
        temperature: T, in units of squared distance, more than 0.
    """

    lambda_: float = 0.5
    temperature: float = 10.0

    def __post_init__(self) -> None:
        if not 0 <= self.lambda_ <= 1:
            raise ValueError(f"lambda_ is {self.lambda_}, expected 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature}, expected more than 0 and finite")

    @property
    def needs_neighbors(self) -> bool:
        """False for λ = 0, the plain model."""
        return self.lambda_ > 0

    def __call__(self, logits: Tensor, neighbors: Neighbors, in_place: bool = False) -> Tensor:
        """Logits of the mixture, shape (R, V), from logits of shape (R, V); `in_place` overwrites those."""
        log_probs = neighbor_log_probs(neighbors.distances, neighbors.values, self.temperature)
        return mix_logits(logits, neighbors.values, log_probs, self.lambda_, in_place)
