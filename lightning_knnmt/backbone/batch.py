"""A padded batch of sentences."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

IGNORED = -100


@dataclass
class Batch:
    """B tokenized sentences, and their translations where they are known.

    Attributes:
        input_ids: Source tokens, shape (B, S), padded.
        attention_mask: 1 for source tokens, 0 for padding, shape (B, S).
        labels: Target tokens, shape (B, T), padded with -100; None when translating.
        cut: Texts that were longer than the model's positions, and were cut.
        sources: The B source texts; empty where only their tokens are known.
    """

    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None = None
    cut: int = 0
    sources: tuple[str, ...] = ()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        labels = None if self.labels is None else self.labels.to(device, non_blocking=non_blocking)
        return Batch(
            self.input_ids.to(device, non_blocking=non_blocking),
            self.attention_mask.to(device, non_blocking=non_blocking),
            labels,
            self.cut,
            self.sources,
        )

    @property
    def source_texts(self) -> tuple[str, ...]:
        """The source texts, one for each sentence.

        Raises:
            ValueError: They are not known.
        """
        if len(self.sources) != len(self):
            raise ValueError(
                f"the batch has {len(self.sources)} source texts for {len(self)} sentences, expected one of each: make "
                "it with the model's batch()"
            )
        return self.sources

    @property
    def target_labels(self) -> Tensor:
        """The labels, shape (B, T).

        Raises:
            ValueError: There are none.
        """
        if self.labels is None:
            raise ValueError("the batch has no labels, expected a batch made with target texts")
        return self.labels

    @property
    def target_mask(self) -> Tensor:
        """True where a label is a token, shape (B, T)."""
        return self.target_labels != IGNORED

    def __len__(self) -> int:
        return len(self.input_ids)


def pad(rows: list[list[int]], value: int) -> Tensor:
    """Right-pad lists of token ids to one tensor of shape (B, longest)."""
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows], dtype=torch.long)


def collate(
    sources: list[list[int]], targets: list[list[int]] | None, pad_id: int, cut: int = 0, texts: Sequence[str] = ()
) -> Batch:
    """Pad tokenized sentences to a batch, which keeps their source texts where they are given."""
    mask = pad([[1] * len(row) for row in sources], 0)
    return Batch(pad(sources, pad_id), mask, None if targets is None else pad(targets, IGNORED), cut, tuple(texts))
