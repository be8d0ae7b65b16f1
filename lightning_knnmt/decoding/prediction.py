"""From the latest tokens of R rows to the best next ones: decoder, projection, mixture, rules."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import LongTensor, Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.row_decoder import RowDecoder, States
from lightning_knnmt.decoding.candidates import Candidates
from lightning_knnmt.decoding.options import SearchOptions
from lightning_knnmt.decoding.top import top_columns
from lightning_knnmt.knn.mixture import Mixture, PlainModel, Widen
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
        spans: Receives the time of `encoder`, counted in sentences, and of `decoder`, `projection`, `gate`, `search`,
            `mix` and `scores`, counted in rows.
        candidates: Tokens that are predicted; None: all.
    """

    decoder: RowDecoder
    project: Callable[[Tensor], Tensor]
    mixture: Mixture | PlainModel
    options: SearchOptions
    spans: Spans
    candidates: Candidates | None = None

    def enter(self, batch: Batch) -> None:
        """Let B sentences be decoded besides those that are."""
        with self.spans.span("encoder", len(batch)):
            self.decoder.enter(batch)
            if self.candidates is not None:
                self.candidates.enter(batch)

    def select(self, rows: Tensor, sentences: Tensor | None) -> None:
        """Let rows go on as `RowDecoder.select` says."""
        self.decoder.select(rows, sentences)
        if self.candidates is not None and sentences is not None:
            self.candidates.leave(sentences)

    def best(self, sequences: "Sequences") -> Best:
        """The best next tokens of all rows, as many as the search considers."""
        step = self.predict(sequences)
        with self.spans.span("scores", len(step)):
            return self._scored(step, sequences)

    def predict(self, sequences: "Sequences") -> Step:
        """All rows with the logits of the mixture, which may be overwritten."""
        latest, rows = sequences.latest, len(sequences) * self.options.beams
        with self.spans.span("decoder", rows):
            states = self.decoder.step(latest)
        with self.spans.span("projection", rows):
            project = self.project if self.candidates is None else self.candidates.project
            logits = project(states.outputs).float()
        step = Step(states.queries, logits, sequences.sentence, True, previous=latest, position=sequences.position)
        return self.mixture.mixed(step, self.spans, self._widening(states))

    def _scored(self, step: Step, sequences: "Sequences") -> Best:
        logits, options = step.logits, self.options
        needed = options.beams > 1 or len(options.processors) > 0
        normalizer = step.log_normalizer if needed else None  # what is forbidden leaves its share to nobody
        candidates = self.candidates
        if len(options.banned):
            banned = options.banned if candidates is None else candidates.columns_of(options.banned)
            logits[:, banned] = -torch.inf
        if options.processors:
            assert normalizer is not None
            logits = logits - normalizer
            logits = logits if candidates is None else candidates.spread(logits)
            logits = options.processors(cast(LongTensor, sequences.history), logits)
            normalizer, candidates = None, None
        values, columns = top_columns(logits, min(sequences.considered, logits.shape[1]))
        tokens = columns if candidates is None else candidates.tokens_of(columns)
        return Best(tokens, values if normalizer is None else values - normalizer)

    def _widening(self, states: States) -> Widen | None:
        candidates = self.candidates
        if candidates is None:
            return None
        return lambda step, neighbors: candidates.widen(step, neighbors, states.outputs)
