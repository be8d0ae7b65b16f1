"""A retriever, a combiner with a parameter, a gate and a model class that the package does not know."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from lightning_knnmt.backbone.keyed_model import KeyedModel, TokenIds
from lightning_knnmt.backbone.seq2seq import Seq2SeqModel
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.gates import Gate
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.step import Step


class OwnRetriever(Retriever):
    """The nearest of those entries whose number is divisible."""

    searched: ClassVar[list[int]] = []

    def __init__(self, k: int = 4, divisor: int = 2) -> None:
        self.k, self.divisor = k, divisor

    def bind(self, model: KeyedModel, memory: Memory) -> None:
        self._memory = memory

    def __call__(self, step: Step) -> Neighbors:
        self.searched.append(len(step))
        every = self._memory.search(step.queries, len(self._memory), nprobe=1000)
        left_out = (every.ids < 0) | (every.ids % self.divisor != 0)
        order = left_out.int().argsort(dim=1, stable=True)[:, : self.k]
        return Neighbors(*(part.gather(1, order) for part in every.parts))


class OwnCombiner(Combiner):
    """λ = σ(offset − d / scale) by the distance of the nearest neighbor, with a learned offset."""

    def __init__(self, start: float = 2.0, scale: float = 20.0, temperature: float = 10.0) -> None:
        super().__init__()
        self.start, self.scale, self.temperature = start, scale, temperature
        self.offset = nn.Parameter(torch.tensor(start))

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        lambda_ = torch.sigmoid(self.offset - neighbors.distances[:, :1] / self.scale)
        return Weights(knn_log_weights(neighbors.distances, self.temperature), lambda_)


class OwnGate(Gate):
    """Opens where the number of the likeliest token leaves a remainder."""

    masks: ClassVar[list[Tensor]] = []

    def __init__(self, modulus: int = 2) -> None:
        super().__init__()
        self.modulus = modulus

    def forward(self, step: Step) -> Tensor:
        self.masks.append(step.logits.argmax(1) % self.modulus != 0)
        return self.masks[-1]


class OwnModel(Seq2SeqModel):
    """Reads every source in capitals."""

    def tokenize(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> TokenIds:
        return super().tokenize([source.upper() for source in sources], targets)


def forget() -> None:
    """Start counting anew."""
    OwnRetriever.searched.clear()
    OwnGate.masks.clear()


def counts() -> tuple[int, int, int]:
    """Rows that the gate saw, rows that it let through, rows that were searched."""
    masks = torch.cat(OwnGate.masks)
    return len(masks), int(masks.sum()), sum(OwnRetriever.searched)
