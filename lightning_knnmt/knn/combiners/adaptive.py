"""A small network chooses, row by row, how many neighbors to trust (arXiv 2105.13022)."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_knnmt.checks import check_at_least, check_number
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.features import distinct_counts, exactly, scaled_distances
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights, log_or_minus_inf
from lightning_knnmt.knn.step import Step
from lightning_knnmt.knn.trained import TrainedPart


class AdaptiveCombiner(TrainedPart, Combiner):
    """p = Σ_k w_k p_k over k in 0, 1, 2, 4, …, K: p_k is the kNN probability of the k nearest, p_0 the model's own.

    The weights w are the softmax of a network of two layers, which sees the K distances and how many different values
    are among the i nearest, for each i (Zheng et al., "Adaptive Nearest Neighbor Machine Translation", eq. 4 and 5).

    Args:
        k: K, the most neighbors that are looked at; a retriever that finds more finds some in vain.
        temperature: T of every p_k, in units of squared distance, more than 0.
        hidden: Units of the hidden layer.
        folder: Where a trained one was written, whose options are taken; None: not trained.
        any_store: Take another datastore of the same model than that of the training.

    Raises:
        ValueError: An option is out of range, or the folder holds no such combiner.

    >>> AdaptiveCombiner(k=6).choices
    (0, 1, 2, 4, 6)
    """

    kept: Tensor

    def __init__(
        self,
        k: int = 8,
        temperature: float = 10.0,
        hidden: int = 32,
        folder: Path | None = None,
        any_store: bool = False,
    ) -> None:
        super().__init__()
        options = self._open(folder, any_store, k=k, temperature=temperature, hidden=hidden)
        self.k, self.temperature, self.hidden = options["k"], options["temperature"], options["hidden"]
        check_at_least(1, k=self.k, hidden=self.hidden)
        check_number(above_zero=True, temperature=self.temperature)
        powers = [1 << bit for bit in range(self.k.bit_length()) if 1 << bit < self.k]
        self.choices = (0, *powers, self.k)
        self.network = nn.Sequential(
            nn.Linear(2 * self.k, self.hidden), nn.Tanh(), nn.Linear(self.hidden, len(self.choices))
        )
        kept = torch.arange(self.k) < torch.tensor(self.choices[1:])[:, None]  # [choice, neighbor]
        self.register_buffer("kept", kept, persistent=False)
        self._restore()

    def choose(self, neighbors: Neighbors) -> Tensor:
        """log w of each choice of k, shape (R, choices)."""
        near = exactly(neighbors, self.k)
        counts = distinct_counts(near) / self.k
        return self.network(torch.cat([scaled_distances(near, self.scale), counts], 1)).log_softmax(1)

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """λ = 1 − w_0, and shares that are the mean of those of every p_k, k > 0, by their weights."""
        chosen = self.choose(neighbors)
        near = exactly(neighbors, self.k)
        distances = torch.where(self.kept, near.distances[:, None], math.inf)  # [R, choices − 1, K]
        weights = None if near.weights is None else near.weights[:, None]
        of_choices = knn_log_weights(distances, self.temperature, weights).exp()
        among = chosen[:, 1:].softmax(1)  # w_k / (1 − w_0)
        shares = (among[:, :, None] * of_choices).sum(1)  # [R, K]
        found = neighbors.ids.shape[1]
        wide = shares.new_zeros(len(shares), max(found, self.k))
        wide[:, : self.k] = shares
        return Weights(log_or_minus_inf(wide[:, :found]), -torch.expm1(chosen[:, :1]))
