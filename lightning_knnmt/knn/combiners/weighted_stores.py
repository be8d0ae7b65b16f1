"""Each of several pooled datastores has a share of the prediction of its own."""

from typing import TYPE_CHECKING

import torch

from lightning_knnmt.checks import check_number, check_share
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.features import log_counts, log_shares
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.pooled import PooledMemory
from lightning_knnmt.knn.probability import log_or_minus_inf
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.knn.memory import Memory


class WeightedStores(Combiner):
    """p_kNN = Σ_s w_s p_s, where p_s is the kNN distribution of those of the K neighbors that datastore s holds.

    The weights of the datastores of which a row has neighbors are scaled to add up to 1. With a single datastore it is
    the fixed combiner.

    Args:
        weights: w, one for each datastore in the order in which they are pooled, each more than 0.
        lambda_: λ, the neighbors' share, in [0, 1].
        temperature: T, in units of distance, more than 0.

    Raises:
        ValueError: An option is out of range.
    """

    def __init__(self, weights: list[float], lambda_: float = 0.5, temperature: float = 10.0) -> None:
        super().__init__()
        if not weights:
            raise ValueError("weights is empty, expected one for each datastore")
        for weight in weights:
            check_number(above_zero=True, weights=weight)
        check_share(lambda_=lambda_)
        check_number(above_zero=True, temperature=temperature)
        self.weights, self.lambda_, self.temperature = weights, lambda_, temperature
        self._memory: PooledMemory | None = None

    @property
    def changes_nothing(self) -> bool:
        """Whether λ is 0, which is the plain model."""
        return self.lambda_ == 0

    def bind(self, model: "KeyedModel", memory: "Memory") -> None:
        """Learn which entries are whose.

        Raises:
            ValueError: There are not as many datastores as weights.
        """
        pooled = memory if isinstance(memory, PooledMemory) else PooledMemory({"": memory})
        if len(pooled.memories) != len(self.weights):
            raise ValueError(
                f"weights has {len(self.weights)} numbers, expected {len(pooled.memories)}, one for each datastore"
            )
        self._memory = pooled

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """The same λ for every row; shares by distance within a datastore, and by its weight."""
        assert self._memory is not None, "bind comes first"
        store = self._memory.store_of(neighbors.ids)  # [R, K]
        nearest = neighbors.distances[:, :1].nan_to_num(posinf=0.0)
        scores = log_counts(neighbors) - (neighbors.distances - nearest) / self.temperature
        shares = torch.zeros_like(neighbors.distances)
        for number, weight in enumerate(self.weights):
            shares = shares + weight * log_shares(scores, store == number).exp()
        total = shares.sum(1, keepdim=True)
        return Weights(log_or_minus_inf(shares / torch.where(total > 0, total, 1.0)), self.lambda_)
