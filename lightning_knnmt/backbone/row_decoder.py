"""Decoding a token at a time, with rows that come and go."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch


@dataclass(frozen=True)
class States:
    """What the decoder says of R rows.

    Attributes:
        queries: The states that neighbors are searched with, shape (R, D).
        outputs: What the model's `project` turns into logits, shape (R, D).
    """

    queries: Tensor
    outputs: Tensor


class RowDecoder(ABC):
    """The decoder between two tokens: caches, and what it attends to. The rows of a sentence lie together.

    Attributes:
        start_id: The first token of every row, which `step` takes first.
        grows: Whether sentences may enter while others are decoded.
    """

    start_id: int
    grows: ClassVar[bool] = False

    @abstractmethod
    def enter(self, batch: Batch) -> None:
        """Encode B sentences, and let their rows follow those that are decoded already."""

    @abstractmethod
    def step(self, tokens: Tensor) -> States:
        """Take the latest token of each row, shape (R,), and stand before the next."""

    @abstractmethod
    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Let rows go on from former rows of the same sentence; what is not named leaves.

        Args:
            rows: Shape (R',).  # [row -> former row]
            sentences: Those that stay, shape (B',); None: all.  # [sentence -> former sentence]
        """


def reordered(state: Tensor, rows: Tensor) -> Tensor:
    """A state whose rows go on from former ones, changed in place where few of them move.

    Args:
        state: Shape (R, …).
        rows: Shape (R',).  # [row -> former row]

    >>> reordered(torch.tensor([5.0, 6.0, 7.0]), torch.tensor([0, 0, 2]))
    tensor([5., 5., 7.])
    """
    if len(rows) == len(state) and state.device.type == "cpu":
        (moved,) = (rows != torch.arange(len(rows))).nonzero(as_tuple=True)
        if not len(moved):
            return state
        if 2 * len(moved) < len(rows):
            return state.index_copy_(0, moved, state.index_select(0, rows[moved]))
    return state.index_select(0, rows)
