"""The sequences that a search extends."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.decoding.options import SearchOptions
from lightning_knnmt.decoding.prediction import Best


@dataclass(frozen=True)
class Advance:
    """What a step changes.

    Attributes:
        done: Number and tokens, shape (T,), of each sentence that has ended.
        rows: [row -> former row], shape (R',); rows of sentences that have ended are gone.
        sentences: [place -> former place], shape (b',); None: none has ended.
    """

    done: list[tuple[int, Tensor]]
    rows: Tensor
    sentences: Tensor | None


class Sequences(ABC):
    """Tokens of k rows for each of b sentences; sentences enter, and leave when they have ended.

    Args:
        options: Beam size k, length and rules.
        start: The first token.

    Attributes:
        numbers: The sentence of each place, shape (b,).  # [place -> sentence]
        considered: How many continuations of each row are looked at.
    """

    considered: int

    def __init__(self, options: SearchOptions, start: int) -> None:
        device = options.eos_ids.device
        self._options, self._start = options, start
        self.numbers = torch.empty(0, dtype=torch.long, device=device)
        self._tokens = torch.empty(0, options.beams, 1, dtype=torch.long, device=device)  # [b, k, T], padded
        self._lengths = torch.empty(0, dtype=torch.long, device=device)  # tokens so far, the start counted

    def __len__(self) -> int:
        return len(self.numbers)

    @property
    def sentence(self) -> Tensor:
        """The sentence of each row, shape (R,).  # [row -> sentence]"""
        return self.numbers.repeat_interleave(self._options.beams)

    @property
    def latest(self) -> Tensor:
        """The latest token of each row, shape (R,)."""
        last = (self._lengths - 1)[:, None, None].expand(-1, self._options.beams, 1)
        return self._tokens.gather(2, last).flatten()

    @property
    def position(self) -> Tensor:
        """Place of each row's next token in its sequence, the start not counted, shape (R,)."""
        return (self._lengths - 1).repeat_interleave(self._options.beams)

    @property
    def history(self) -> Tensor:
        """All tokens so far, shape (R, T), of sentences that have entered together."""
        return self._tokens.flatten(0, 1)[:, : int(self._lengths[0])]

    def enter(self, numbers: Tensor) -> None:
        """Begin sentences of some numbers, shape (B,)."""
        shape = len(numbers), self._options.beams, self._tokens.shape[2]
        self.numbers = torch.cat([self.numbers, numbers])
        self._tokens = torch.cat([self._tokens, self._tokens.new_full(shape, self._start)])
        self._lengths = torch.cat([self._lengths, torch.ones_like(numbers)])

    @abstractmethod
    def advance(self, best: Best) -> Advance:
        """Go on with the best continuations of each row."""

    def _write(self, beam: Tensor | None, tokens: Tensor) -> None:
        """Let rows go on from beams of their sentence, with new tokens, both of shape (b, k)."""
        before = self._tokens
        if beam is not None:
            before = before.gather(1, beam[:, :, None].expand(-1, -1, before.shape[2]))
        places = self._lengths[:, None, None].expand(-1, self._options.beams, 1)
        self._tokens = longer(before, int(self._lengths.max()) + 1).scatter_(2, places, tokens[:, :, None])

    def _leave(self, stay: Tensor) -> None:
        self.numbers, self._lengths = self.numbers[stay], self._lengths[stay]
        longest = int(self._lengths.max()) if len(stay) else 1
        self._tokens = self._tokens[stay, :, :longest]


class Greedy(Sequences):
    """One sequence of each sentence, which takes the likeliest token at each step."""

    considered = 1

    def advance(self, best: Best) -> Advance:
        """Go on with the best token of each row, shape (R, 1)."""
        tokens = best.tokens[:, :1]
        over = torch.isin(tokens[:, 0], self._options.eos_ids) | (self._lengths == self._options.max_new_tokens)
        self._write(None, tokens)
        self._lengths = self._lengths + 1
        if not over.any():
            return Advance([], torch.arange(len(tokens), device=tokens.device), None)
        places = over.nonzero().flatten()
        done = [
            (number, row[:length])
            for number, row, length in zip(
                self.numbers[places].tolist(), self._tokens[places, 0], self._lengths[places].tolist(), strict=True
            )
        ]
        stay = (~over).nonzero().flatten()
        self._leave(stay)
        return Advance(done, stay, stay)


def longer(tokens: Tensor, length: int) -> Tensor:
    """Tokens (…, T) with room for `length` of them; the same tensor if there is.

    >>> longer(torch.tensor([[1, 2]]), 3)
    tensor([[1, 2, 0]])
    """
    missing = length - tokens.shape[-1]
    return F.pad(tokens, (0, missing)) if missing > 0 else tokens
