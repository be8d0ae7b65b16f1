"""How the model's prediction and the neighbors' are mixed: p = λ p_kNN + (1 − λ) p_NMT."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_knnmt.knn.component import Component
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import log_or_minus_inf, mix_logits, neighbor_log_probs, token_log_probs
from lightning_knnmt.knn.step import Step


@dataclass(frozen=True)
class Weights:
    """What a combiner decides in R rows.

    Attributes:
        log_shares: Log of each neighbor's share of p_kNN, shape (R, K); the shares of a row sum to 1, and −inf is a
            neighbor that does not count.
        lambda_: λ, the share of p_kNN, in [0, 1]: one number, or one of each row, shape (R, 1).
    """

    log_shares: Tensor
    lambda_: float | Tensor


class Combiner(Component, nn.Module, ABC):
    """Mixes neighbors into logits; what a method has to say is `weigh`, the rest is the same for all.

    A row without neighbors keeps the model's prediction.

    Attributes:
        distance_options: Options in units of squared distance, which every model has another scale of: where no values
            are given, tuning tries these multiples of the distance that half of the nearest neighbors have.
    """

    distance_options: ClassVar[dict[str, tuple[float, ...]]] = {"temperature": (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)}

    @abstractmethod
    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """λ of each row, and each neighbor's share of p_kNN."""

    @property
    def changes_nothing(self) -> bool:
        """Whether the mixture is the plain model's prediction, whatever is found."""
        return False

    def forward(self, step: Step, neighbors: Neighbors) -> Tensor:
        """Logits of the mixture, shape (R, V), float32."""
        return self.mix(step, neighbors).logits

    def mix(self, step: Step, neighbors: Neighbors) -> Step:
        """The same rows with the logits of the mixture, whose normaliser follows without another pass over V.

        Raised logits add λ / (1 − λ) · exp lse(z) to the sum of exponentials, so that lse(z') = lse(z) − log(1 − λ);
        with λ = 1 only log p_kNN is left, and lse(z') is 0.
        """
        weights = self.weigh(step, neighbors)
        before = step.log_normalizer
        log_probs = neighbor_log_probs(weights.log_shares, neighbors.values)
        logits = mix_logits(step.logits, neighbors.values, log_probs, weights.lambda_, before, in_place=step.writable)
        found = weights.log_shares.isfinite().any(1, keepdim=True)  # [R, 1]
        lambda_ = torch.as_tensor(weights.lambda_, dtype=torch.float32, device=before.device)
        after = before - torch.log1p(-lambda_.clamp(max=1 - 1e-7))
        after = torch.where(lambda_ >= 1, torch.zeros_like(before), after)
        return Step(step.queries, logits, step.sentence, True, torch.where(found, after, before))

    def token_log_probs(self, step: Step, neighbors: Neighbors, tokens: Tensor) -> Tensor:
        """log p of one token of each row, without a pass over the vocabulary for every combiner.

        Args:
            step: R rows.
            neighbors: Theirs.
            tokens: Shape (R,).

        Returns:
            Shape (R,), float32.
        """
        weights = self.weigh(step, neighbors)
        plain = (step.logits.gather(1, tokens[:, None]).float() - step.log_normalizer).squeeze(1)
        knn = token_log_probs(weights.log_shares, neighbors.values, tokens)
        lambda_ = torch.as_tensor(weights.lambda_, dtype=torch.float32, device=plain.device).reshape(-1)  # [1] or [R]
        found = weights.log_shares.isfinite().any(1)
        lambda_ = torch.where(found, lambda_, 0.0)
        return torch.logaddexp(knn + log_or_minus_inf(lambda_), plain + log_or_minus_inf(1 - lambda_))
