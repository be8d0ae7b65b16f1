"""Which rows search at all: a model that is sure of its next token needs no neighbors."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from lightning_knnmt.checks import check_share
from lightning_knnmt.knn.component import Component
from lightning_knnmt.knn.step import Step


class Gate(Component, nn.Module, ABC):
    """Says which rows of a step search; the others keep the model's prediction."""

    @abstractmethod
    def forward(self, step: Step) -> Tensor:
        """A mask of shape (R,), True for rows that search."""


class OpenGate(Gate):
    """Every row searches."""

    def forward(self, step: Step) -> Tensor:
        """True for every row."""
        return torch.ones(len(step), dtype=torch.bool, device=step.queries.device)


class ConfidenceGate(Gate):
    """Rows search where the model's largest probability is below a threshold (compare arXiv 2406.06073).

    Args:
        threshold: In [0, 1]; 0 closes the gate, 1 opens it for all but rows that are entirely sure.

    >>> ConfidenceGate(0.9)(Step(torch.zeros(2, 3), torch.tensor([[0.0, 5.0], [0.0, 1.0]]), torch.arange(2)))
    tensor([False,  True])
    """

    def __init__(self, threshold: float = 0.99) -> None:
        super().__init__()
        check_share(threshold=threshold)
        self.threshold = threshold

    def forward(self, step: Step) -> Tensor:
        """True where the largest probability is below the threshold."""
        largest = step.logits.amax(1).float() - step.log_normalizer.squeeze(1)
        return largest.exp() < self.threshold
