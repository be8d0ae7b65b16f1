"""One decoding step: what the model says before neighbors are asked."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """R rows of one decoding step, or of a teacher-forced pass.

    Attributes:
        queries: The states that predict the next token, shape (R, D).
        logits: The model's logits z, shape (R, V).
        sentence: The sentence of each row, from 0 within the batch, shape (R,).  # [row -> sentence]
        writable: Whether the logits may be overwritten.
        normalizer: lse(z), shape (R, 1), where it is known already.
        previous: The token before each row's, shape (R,), where it is known; at position 0 it means nothing.
        position: Place of each row's token in its text, from 0, shape (R,), where it is known.
    """

    queries: Tensor
    logits: Tensor
    sentence: Tensor
    writable: bool = False
    normalizer: Tensor | None = None
    previous: Tensor | None = None
    position: Tensor | None = None

    @cached_property
    def log_normalizer(self) -> Tensor:
        """lse(z), shape (R, 1), float32: computed once, whoever needs it."""
        return log_sum_exp(self.logits) if self.normalizer is None else self.normalizer

    def rows(self, chosen: Tensor) -> "Step":
        """Some of the rows, chosen by a mask of shape (R,) or by their numbers."""
        return Step(
            self.queries[chosen], self.logits[chosen], self.sentence[chosen],
            previous=None if self.previous is None else self.previous[chosen],
            position=None if self.position is None else self.position[chosen],
        )  # fmt: skip

    def __len__(self) -> int:
        return len(self.queries)


def log_sum_exp(logits: Tensor) -> Tensor:
    """Shape (R, V) -> (R, 1), float32; on a CPU in blocks of rows whose temporaries stay in its cache.

    >>> log_sum_exp(torch.zeros(1, 4)).exp()
    tensor([[4.]])
    """
    rows = max(1, 2**19 // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return torch.cat([torch.logsumexp(block.float(), 1, keepdim=True) for block in logits.split(rows)])


def sentences_of_rows(rows: int, sentences: int, device: torch.device | str = "cpu") -> Tensor:
    """The sentence of each row when the beams of a sentence lie together, shape (R,).

    >>> sentences_of_rows(6, 3)
    tensor([0, 0, 1, 1, 2, 2])
    """
    return torch.arange(sentences, device=device).repeat_interleave(rows // max(1, sentences))
