"""The same λ and T at every step (arXiv 2010.00710)."""

from lightning_knnmt.checks import check_number, check_share
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights
from lightning_knnmt.knn.step import Step


class FixedCombiner(Combiner):
    """p = λ p_kNN + (1 − λ) p_NMT with p_kNN(y) ∝ Σ_i 1[y = v_i] exp(−d_i / T) (arXiv 2010.00710, eq. 2 and 3).

    Args:
        lambda_: λ, the neighbors' share, in [0, 1].
        temperature: T, in units of distance (squared L2, or similarity), more than 0.

    >>> import torch
    >>> from lightning_knnmt.knn.neighbors import Neighbors
    >>> step = Step(torch.zeros(1, 3), torch.zeros(1, 2), torch.zeros(1))  # two tokens, equally likely
    >>> found = Neighbors(torch.tensor([[4.0]]), torch.tensor([[1]]), torch.tensor([[0]]))
    >>> FixedCombiner(lambda_=0.5)(step, found).softmax(1)
    tensor([[0.2500, 0.7500]])
    """

    def __init__(self, lambda_: float = 0.5, temperature: float = 10.0) -> None:
        super().__init__()
        check_share(lambda_=lambda_)
        check_number(above_zero=True, temperature=temperature)
        self.lambda_, self.temperature = lambda_, temperature

    @property
    def changes_nothing(self) -> bool:
        """Whether λ is 0, which is the plain model."""
        return self.lambda_ == 0

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """The same λ for every row; shares by distance."""
        return Weights(knn_log_weights(neighbors.distances, self.temperature, neighbors.weights), self.lambda_)
