"""Vocabulary selection: a part of the vocabulary that is predicted instead of all of it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.firefox.shortlist import Shortlist
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.step import Step


@dataclass(frozen=True)
class Likely:
    """The tokens that a table allows for sources.

    Attributes:
        table: Target tokens by source token.
        vocabulary_size: V.
        shared: Whether source and target have one vocabulary, so that each source token may be copied.
    """

    table: Shortlist
    vocabulary_size: int
    shared: bool

    def __call__(self, source_ids: set[int]) -> Tensor:
        """Token ids, ascending."""
        return torch.from_numpy(self.table.allowed(source_ids, self.vocabulary_size, self.shared))


class Candidates:
    """C tokens that logits stand for: those that are likely for the sentences that are decoded, those that are always
    needed, and those that neighbors bring, which are added when they come and stay until another sentence enters.

    Args:
        likely: The tokens of sources.
        needed: Token ids without which no sequence ends, shape (number,).
        weight: The output projection, shape (V, D).
        bias: Its bias, shape (V,), or None.
    """

    def __init__(self, likely: Likely, needed: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self._likely, self._needed = likely, needed
        self._all = weight, weight.new_zeros(len(weight)) if bias is None else bias
        self._sources: list[set[int]] = []  # [place -> tokens of the sentence]
        self._place = needed.new_full((len(weight),), -1)  # [token -> column]
        self._size = 0
        self._tokens, self._weight, self._bias = needed.new_empty(0), weight[:0], self._all[1][:0]

    def __len__(self) -> int:
        return self._size

    def enter(self, batch: Batch) -> None:
        """Let tokens of B more sentences be candidates, and forget those that only left sentences needed."""
        ids = zip(batch.input_ids.tolist(), batch.attention_mask.sum(1).tolist(), strict=True)
        self._sources += [set(row[:length]) for row, length in ids]
        tokens = self._likely(set().union(*self._sources)).to(self._needed)
        self._place.fill_(-1)
        self._size = 0
        self._add(torch.cat([tokens, self._needed]).unique())

    def leave(self, stay: Tensor) -> None:
        """Only the sentences at some places are decoded further."""
        self._sources = [self._sources[place] for place in stay.tolist()]

    def project(self, outputs: Tensor) -> Tensor:
        """Logits of decoder outputs: (R, D) -> (R, C)."""
        return F.linear(outputs, self._weight[: self._size], self._bias[: self._size])

    def tokens_of(self, columns: Tensor) -> Tensor:
        """Token ids of columns of the logits."""
        return self._tokens[columns]

    def columns_of(self, tokens: Tensor) -> Tensor:
        """Columns of those token ids that are candidates."""
        columns = self._place[tokens]
        return columns[columns >= 0]

    def spread(self, logits: Tensor) -> Tensor:
        """Logits (R, C) as (R, V), −inf where there is no candidate."""
        whole = logits.new_full((len(logits), len(self._place)), -torch.inf)
        whole[:, self._tokens[: self._size]] = logits
        return whole

    def widen(self, step: Step, neighbors: Neighbors, outputs: Tensor) -> tuple[Step, Neighbors]:
        """A step with a logit for every retrieved token, and neighbors whose values are columns.

        Args:
            step: R rows with logits of shape (R, C).
            neighbors: Theirs, with token ids as values.
            outputs: The decoder's outputs of the rows, shape (R, D).
        """
        missing = (self._place[neighbors.values] < 0) & (neighbors.ids >= 0)
        if missing.any():
            new = neighbors.values[missing].unique()
            self._add(new)
            weight, bias = self._all
            more = F.linear(outputs, weight[new], bias[new]).to(step.logits.dtype)
            step = Step(step.queries, torch.cat([step.logits, more], 1), step.sentence, step.writable)
        return step, replace(neighbors, values=self._place[neighbors.values].clamp(min=0))

    def _add(self, tokens: Tensor) -> None:
        before, self._size = self._size, self._size + len(tokens)
        if self._size > len(self._tokens):  # make room for as many again: tokens come a few at a time
            room = min(2 * self._size, len(self._place))
            self._tokens = _longer(self._tokens, room)
            self._weight, self._bias = _longer(self._weight, room), _longer(self._bias, room)
        self._tokens[before : self._size] = tokens
        self._weight[before : self._size] = self._all[0][tokens]
        self._bias[before : self._size] = self._all[1][tokens]
        self._place[tokens] = torch.arange(before, self._size, device=tokens.device)


def _longer(tensor: Tensor, length: int) -> Tensor:
    longer = tensor.new_empty(length, *tensor.shape[1:])
    longer[: len(tensor)] = tensor
    return longer
