"""Which rows search at all: a model that is sure of its next token needs no neighbors."""

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn

from lightning_knnmt.checks import check_at_least, check_share
from lightning_knnmt.knn.component import Component
from lightning_knnmt.knn.features import top_log_probs, two_layers
from lightning_knnmt.knn.step import Step
from lightning_knnmt.knn.trained import TrainedPart

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.knn.memory import Memory

TOP = 4  # of the model's probabilities that a learned gate looks at
LEAST = -20.0  # log-probability, below which all tokens are equally unlikely


class Gate(Component, nn.Module, ABC):
    """Says which rows of a step search; the others keep the model's prediction.

    Attributes:
        usual_options: Values of its options that tuning tries for a stated loss, where none are given.
    """

    usual_options: ClassVar[dict[str, tuple[float, ...]]] = {}

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

    usual_options: ClassVar = {"threshold": (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 1.0)}

    def __init__(self, threshold: float = 0.99) -> None:
        super().__init__()
        check_share(threshold=threshold)
        self.threshold = threshold

    def forward(self, step: Step) -> Tensor:
        """True where the largest probability is below the threshold."""
        largest = step.logits.amax(1).float() - step.log_normalizer.squeeze(1)
        return largest.exp() < self.threshold


class LearnedGate(TrainedPart, Gate):
    """Rows search where a small network expects neighbors to raise the reference's log-likelihood (arXiv 2406.06073).

    It sees the query, the model's largest log-probabilities, their margin and their entropy, and is trained on what
    neighbors have gained, so that a threshold leaves out the searches that gain least.

    Args:
        threshold: Rows search where more nats than that are expected to be gained; −inf opens the gate for all, and
            +inf for none. It may be chosen anew after the training, by tuning with `max_loss` as well.
        hidden: Units of the hidden layer.
        key_size: D of the model, which is filled in where a gate is trained; 0: not known yet.
        folder: Where a trained one was written, whose other options are taken; None: not trained.
        any_store: Take another datastore of the same model than that of the training.

    Raises:
        ValueError: An option is out of range, or the folder holds no such gate.
    """

    free_options = ("threshold",)
    usual_options: ClassVar = {"threshold": (-math.inf, -0.02, 0.0, 0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)}
    sees_states = True

    def __init__(
        self,
        threshold: float = 0.0,
        hidden: int = 32,
        key_size: int = 0,
        folder: Path | None = None,
        any_store: bool = False,
    ) -> None:
        super().__init__()
        options = self._open(folder, any_store, threshold=threshold, hidden=hidden, key_size=key_size)
        self.threshold, self.hidden, self.key_size = options["threshold"], options["hidden"], options["key_size"]
        if math.isnan(self.threshold):
            raise ValueError(f"threshold is {threshold}, expected a number of nats")
        check_at_least(1, hidden=self.hidden)
        check_at_least(0, key_size=self.key_size)
        if self.key_size:
            self._build()
        self._restore()

    def _build(self) -> None:
        self.network = two_layers(self.key_size + TOP + 2, self.hidden, nn.Tanh())

    def bind(self, model: "KeyedModel", memory: "Memory") -> None:
        """Learn the size of queries.

        Raises:
            ValueError: It was trained for another model or datastore.
        """
        super().bind(model, memory)
        if not self.key_size:
            self.key_size = memory.key_size
            self._build()
            self.to(self.scale.device)

    def expected_gain(self, step: Step) -> Tensor:
        """How many nats neighbors are expected to add to the reference's log-likelihood, shape (R,)."""
        top = top_log_probs(step, TOP).clamp(min=LEAST)  # [R, TOP]
        entropy = -(top.exp() * top).sum(1, keepdim=True)  # of the largest; the others add little
        queries = step.queries.float() * (self.key_size / self.scale).sqrt()
        return self.network(torch.cat([queries, top, top[:, :1] - top[:, 1:2], entropy], 1)).squeeze(1)

    def forward(self, step: Step) -> Tensor:
        """True where more is expected than the threshold."""
        return self.expected_gain(step) > self.threshold
