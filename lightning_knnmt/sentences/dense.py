"""Sentences as vectors, compared by the cosine of the angle between them."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.sentences.encoders import SentenceEncoder

BLOCK = 65536  # vectors that are compared with the queries at a time


class DenseSentences:
    """Vectors of N sentences, searched exactly.

    Args:
        vectors: Of length 1, shape (N, E), float16.
        encoder: Makes those of the texts that are looked for.
    """

    def __init__(self, vectors: Tensor, encoder: SentenceEncoder) -> None:
        self.vectors, self.encoder = vectors, encoder

    def __len__(self) -> int:
        return len(self.vectors)

    def search(
        self, texts: Sequence[str], count: int, kept: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """Numbers of the sentences that are most like each of some texts, best first; see `SentenceSearch`."""
        queries = self.encoder.encode(texts)  # [B, E]
        best = queries.new_empty(len(texts), 0)
        numbers = torch.empty(len(texts), 0, dtype=torch.long)
        for first in range(0, len(self), BLOCK):
            block = self.vectors[first : first + BLOCK]
            cosines = queries @ block.float().T
            if kept is not None:
                cosines[:, torch.from_numpy(~kept[first : first + BLOCK])] = -torch.inf
            best = torch.cat([best, cosines], 1)
            numbers = torch.cat([numbers, torch.arange(first, first + len(block)).expand(len(texts), -1)], 1)
            best, order = best.topk(min(count, best.shape[1]), sorted=True)
            numbers = numbers.gather(1, order)
        return [row[own.isfinite()].numpy() for row, own in zip(numbers, best, strict=True)]
