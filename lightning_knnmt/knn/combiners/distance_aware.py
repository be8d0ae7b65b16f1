"""λ by the distance of the nearest neighbor (SK-MT, arXiv 2302.12188)."""

from typing import ClassVar

from lightning_knnmt.checks import check_number
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights
from lightning_knnmt.knn.step import Step


class DistanceAwareCombiner(Combiner):
    """λ = relu(1 − d_1 / τ) and p_kNN(y) ∝ Σ_i 1[y = v_i] exp(−d_i / T).

    "Simple and Scalable Nearest Neighbor Machine Translation" (Dai et al., ICLR 2023): a context that is stored as it
    is decides alone, and one that is farther than τ counts nothing. Both defaults are the paper's, for keys of 1024
    dimensions; squared distances of another model have another scale, and tuning finds it.

    Args:
        tau: τ, the squared distance of the nearest neighbor from which on neighbors count nothing, more than 0.
        temperature: T, in units of squared distance, more than 0.

    >>> import torch
    >>> found = Neighbors(torch.tensor([[25.0]]), torch.tensor([[1]]), torch.tensor([[0]]))
    >>> step = Step(torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1))  # two tokens, equally likely
    >>> DistanceAwareCombiner(tau=50)(step, found).softmax(1)
    tensor([[0.2500, 0.7500]])
    """

    distance_options: ClassVar[dict[str, tuple[float, ...]]] = {
        "tau": (1, 4, 16, 64), "temperature": (0.2, 0.8, 3.2)
    }  # fmt: skip

    def __init__(self, tau: float = 100.0, temperature: float = 100.0) -> None:
        super().__init__()
        check_number(above_zero=True, tau=tau, temperature=temperature)
        self.tau, self.temperature = tau, temperature

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """λ by the nearest neighbor of each row; shares by distance."""
        nearest = neighbors.distances[:, :1].float()
        shares = knn_log_weights(neighbors.distances, self.temperature, neighbors.weights)
        return Weights(shares, (1 - nearest / self.tau).clamp(min=0))
