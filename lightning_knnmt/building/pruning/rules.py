"""Which entries of a datastore are dropped."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.building.pruning.merging import merge_greedily
from lightning_knnmt.checks import check_at_least, check_share


@dataclass(frozen=True)
class Evidence:
    """What rules decide by; N entries of a datastore, those that were removed not among them.

    Attributes:
        values: Their tokens, shape (N,).
        weights: How many entries each stands for, shape (N,).
        neighbors: The K nearest others of each, nearest first, −1 where there are fewer, shape (N, K).
        predicted: Whether the model predicts each by itself, shape (N,); empty where no rule asks for it.
    """

    values: NDArray[np.int32]
    weights: NDArray[np.int32]
    neighbors: NDArray[np.int64]
    predicted: NDArray[np.bool_]


@dataclass(frozen=True)
class Decision:
    """What is left of N entries.

    Attributes:
        kept: Which of them are kept, shape (N,).
        weights: How many entries each then stands for, shape (N,).
        reason: Why the others are dropped.
    """

    kept: NDArray[np.bool_]
    weights: NDArray[np.int32]
    reason: str


class PruningRule(ABC):
    """Decides which entries are dropped; a dataclass of its options."""

    neighbors: int = 0
    """K, how many nearest other entries it looks at."""

    asks_model: bool = False
    """Whether it must be known which entries the model predicts by itself."""

    @abstractmethod
    def decide(self, evidence: Evidence) -> Decision:
        """What is left; the same for the same evidence."""

    @property
    def options(self) -> dict[str, Any]:
        """The options by their names."""
        return asdict(self)  # type: ignore[call-overload]


@dataclass(frozen=True)
class RandomPruning(PruningRule):
    """Drops entries at random: the control that other rules are compared with.

    Args:
        share: Share of the entries that are dropped, in [0, 1].
        seed: Of the draw.
    """

    share: float = 0.5
    seed: int = 1

    def __post_init__(self) -> None:
        check_share(share=self.share)
        check_at_least(0, seed=self.seed)

    def decide(self, evidence: Evidence) -> Decision:
        """Drop as many as asked for."""
        entries = np.arange(len(evidence.values))
        kept = ~_drawn(entries, round(self.share * len(entries)), len(entries), self.seed)
        return Decision(kept, evidence.weights, "at random")


@dataclass(frozen=True)
class KnowledgeMarginPruning(PruningRule):
    """Drops at random entries around which the model is right without neighbors (PLAC, Findings of ACL 2023).

    The knowledge margin of an entry is the largest m such that the model predicts all of the m nearest entries by
    itself, the entry among them: it is 0 where the model is wrong. Only entries of a sufficient margin are dropped.

    Args:
        share: Share of all entries that are dropped, in [0, 1], if so many have the margin.
        margin: Least knowledge margin of an entry that may be dropped.
        seed: Of the draw.
    """

    share: float = 0.45
    margin: int = 4
    seed: int = 1
    asks_model = True

    def __post_init__(self) -> None:
        check_share(share=self.share)
        check_at_least(1, margin=self.margin)
        check_at_least(0, seed=self.seed)

    @property
    def neighbors(self) -> int:  # type: ignore[override]
        """The entry itself counts as the nearest."""
        return self.margin - 1

    def decide(self, evidence: Evidence) -> Decision:
        """Drop as many as asked for of those that have the margin."""
        total = len(evidence.values)
        margins = knowledge_margins(evidence.neighbors, evidence.predicted)
        known = np.flatnonzero(margins >= self.margin)
        kept = ~_drawn(known, round(self.share * total), total, self.seed)
        return Decision(kept, evidence.weights, f"knowledge margin of {self.margin} or more")


@dataclass(frozen=True)
class GreedyMerging(PruningRule):
    """Entries with the same token among each other's k nearest become one, of as much weight (arXiv 2204.12608).

    Args:
        k: Nearest entries that one is merged with.
    """

    k: int = 2

    def __post_init__(self) -> None:
        check_at_least(1, k=self.k)

    @property
    def neighbors(self) -> int:  # type: ignore[override]
        """As many as are merged."""
        return self.k

    def decide(self, evidence: Evidence) -> Decision:
        """Merge in the order of the entries."""
        kept, weights = merge_greedily(evidence.neighbors, evidence.values, evidence.weights)
        return Decision(kept, weights, "merged into a near entry of the same token")


def knowledge_margins(neighbors: NDArray[np.int64], predicted: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Knowledge margin of N entries, up to K + 1.

    Args:
        neighbors: The K nearest others of each, nearest first, −1 where there are fewer, shape (N, K).
        predicted: Whether the model predicts each by itself, shape (N,).

    Returns:
        Shape (N,); 0 where the model is wrong.

    >>> knowledge_margins(np.array([[1, 2], [0, 2], [0, 1]]), np.array([True, True, False]))
    array([2, 2, 0])
    """
    nearest = np.concatenate([np.arange(len(predicted))[:, None], neighbors], 1)  # [N, K + 1]
    right = predicted[nearest] & (nearest >= 0)
    return np.logical_and.accumulate(right, axis=1).sum(1)


def _drawn(among: NDArray[np.int64], size: int, total: int, seed: int) -> NDArray[np.bool_]:
    """Which of all entries are drawn: so many of some, or all of these."""
    drawn = np.zeros(total, bool)
    drawn[np.random.default_rng(seed).permutation(among)[:size]] = True
    return drawn
