"""From the latest tokens of R rows to the best next ones: decoder, projection, mixture, rules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import LongTensor, Tensor

from lightning_knnmt.backbone.row_decoder import RowDecoder
from lightning_knnmt.decoding.options import SearchOptions
from lightning_knnmt.decoding.top import top_columns
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.step import Step
from lightning_knnmt.timing import Spans

if TYPE_CHECKING:
    from lightning_knnmt.decoding.sequences import Sequences


@dataclass(frozen=True)
class Best:
    """The k best next tokens of R rows, best first.

    Attributes:
        tokens: Token ids, shape (R, k).
        scores: Their log-probabilities, float32, shape (R, k); in greedy search their logits.
    """

    tokens: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Predictor:
    """Predicts the next tokens of rows.

    Attributes:
        decoder: The model's decoder of the rows.
        project: Its output projection, (R, D) -> (R, V).
        mixture: What is mixed in.
        options: What is forced and suppressed.
        spans: Receives the time of `decoder`, `projection`, `gate`, `search`, `mix` and `scores`, counted in rows.
    """

    decoder: RowDecoder
    project: Callable[[Tensor], Tensor]
    mixture: Mixture | PlainModel
    options: SearchOptions
    spans: Spans

    def best(self, sequences: "Sequences") -> Best:
        """The best next tokens of all rows, as many as the search considers."""
        latest, rows = sequences.latest, len(sequences) * self.options.beams
        with self.spans.span("decoder", rows):
            states = self.decoder.step(latest)
        with self.spans.span("projection", rows):
            logits = self.project(states.outputs).float()
        step = self.mixture.mixed(Step(states.queries, logits, sequences.sentence, writable=True), self.spans)
        with self.spans.span("scores", rows):
            return self._scored(step, sequences)

    def _scored(self, step: Step, sequences: "Sequences") -> Best:
        logits, options = step.logits, self.options
        needed = options.beams > 1 or len(options.processors) > 0
        normalizer = step.log_normalizer if needed else None  # what is forbidden leaves its share to nobody
        if len(options.banned):
            logits[:, options.banned] = -torch.inf
        if options.processors:
            assert normalizer is not None
            logits = options.processors(cast(LongTensor, sequences.history), logits - normalizer)
            normalizer = None
        values, tokens = top_columns(logits, min(sequences.considered, logits.shape[1]))
        return Best(tokens, values if normalizer is None else values - normalizer)
