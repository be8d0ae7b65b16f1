"""Several models, each with a memory of its own: their probabilities are averaged at every step (arXiv 2310.12352)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_number
from lightning_knnmt.decoding.options import SearchOptions
from lightning_knnmt.decoding.prediction import Predictor
from lightning_knnmt.decoding.together import SharedTranslator
from lightning_knnmt.decoding.translator import Decoding, Translator
from lightning_knnmt.knn.probability import mean_log_probs
from lightning_knnmt.knn.step import Step, sentences_of_rows
from lightning_knnmt.storage.ranks import Ranks
from lightning_knnmt.timing import Spans


class EnsembleTranslator(SharedTranslator):
    """Decodes with p = Σ_m w_m p_m, where p_m is what translator m predicts: its model's mixture with its neighbors.

    Options of decoding, and rules such as forced tokens, are those of the first.

    Args:
        members: A translator of each model.
        weights: w, one for each, more than 0, scaled to add up to 1; None: all alike.

    Raises:
        ValueError: The models do not speak of the same tokens, or something here cannot be done together.
    """

    def __init__(self, members: Sequence[Translator], weights: Sequence[float] | None = None) -> None:
        if not members:
            raise ValueError("there are no members, expected one translator or more")
        self.members = tuple(members)
        self.weights = tuple(weights or [1.0] * len(members))
        if len(self.weights) != len(members):
            raise ValueError(f"weights has {len(self.weights)} numbers, expected {len(members)}, one for each model")
        for weight in self.weights:
            check_number(above_zero=True, weights=weight)
        for each in members:
            check_whole_vocabulary(each.decoding)
        first = members[0]
        super().__init__(first.model, first.mixture, first.decoding, Ranks())
        check_same_tokens([each.model for each in members])

    def _begin(self, batch: Batch, spans: Spans) -> None:
        for each in self.members:
            each._begin(batch, spans)

    def _enter(self, options: SearchOptions) -> bool:
        return all(each._enter(options) for each in self.members)

    def _predictor(self, options: SearchOptions, spans: Spans) -> Predictor:
        first, *others = (each._predictor(options, spans) for each in self.members)
        return EnsemblePredictor(**vars(first), others=tuple(others), weights=self.weights)

    def _generate(self, batch: Batch, spans: Spans) -> Tensor:
        """By the first model's `generate`: at each step, every other model reads what has been produced anew."""
        self._begin(batch, spans)
        decoding = self.decoding
        options = {**decoding.options, "use_cache": False}  # so that the model sees all of it, and so do the others

        def mix(queries: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
            sentence = sentences_of_rows(len(queries), len(batch), queries.device)
            first = Step(queries, logits, sentence)
            steps = [
                first if each.model is self.model else _next_step(each.model, batch, sentence, tokens)
                for each in self.members
            ]
            position = torch.full_like(sentence, tokens.shape[1] - 1)
            steps = [replace(step, previous=tokens[:, -1], position=position) for step in steps]
            mixed = [each.mixture.mixed(step, spans) for each, step in zip(self.members, steps, strict=True)]
            return mean_step(mixed, self.weights).logits

        with torch.inference_mode(), self.model.mixing(mix):
            return self.model.generate(
                batch, num_beams=decoding.beams, max_new_tokens=decoding.max_new_tokens, **options
            )


@dataclass(frozen=True)
class EnsemblePredictor(Predictor):
    """Predicts the next tokens of rows with several models.

    Attributes:
        others: Predictors of the models besides the first.
        weights: One for each model.
    """

    others: tuple[Predictor, ...] = ()
    weights: tuple[float, ...] = (1.0,)

    def enter(self, batch: Batch) -> None:
        """Let B sentences be decoded besides those that are."""
        super().enter(batch)
        for each in self.others:
            each.enter(batch)

    def select(self, rows: Tensor, sentences: Tensor | None) -> None:
        """Let rows go on as `RowDecoder.select` says."""
        super().select(rows, sentences)
        for each in self.others:
            each.select(rows, sentences)

    def predict(self, sequences: Any) -> Step:
        """All rows with the mean of the models' log-probabilities."""
        steps = [super().predict(sequences), *(each.predict(sequences) for each in self.others)]
        with self.spans.span("scores", len(steps[0])):
            return mean_step(steps, self.weights)


def mean_step(steps: Sequence[Step], weights: Sequence[float]) -> Step:
    """The same rows as several models see them, with the mean of their probabilities and the queries of the first."""
    first = steps[0]
    if len(steps) == 1:
        return first
    logits = mean_log_probs([step.logits for step in steps], [step.log_normalizer for step in steps], weights)
    return Step(first.queries, logits, first.sentence, True, torch.zeros_like(first.log_normalizer))


def check_whole_vocabulary(decoding: Decoding) -> None:
    """Refuse a shortlist: each model would predict tokens of its own.

    Raises:
        ValueError: There is one.
    """
    if decoding.shortlist is not None:
        raise ValueError(
            f"shortlist is {decoding.shortlist}, expected none: the models of an ensemble predict the whole vocabulary"
        )


def check_same_tokens(models: Sequence[KeyedModel]) -> None:
    """Refuse models whose probabilities cannot be averaged: they have other tokens, or read texts otherwise.

    Raises:
        ValueError: They differ, or one has to be decoded by `generate`.
    """
    for model in models:
        if model.search_rules() is None:
            raise ValueError(f"{model.name} is decoded by generate alone, expected translation models in an ensemble")
    first, *others = models
    for other in others:
        theirs = _told(other)
        for what, ours in _told(first).items():
            if ours != theirs[what]:
                raise ValueError(
                    f"{first.name} and {other.name} cannot be one ensemble: {what} is {ours} and {theirs[what]}, "
                    "expected the same"
                )


def _told(model: KeyedModel) -> dict[str, Any]:
    """What models of an ensemble have in common."""
    return {
        "tokenizer": model.tokenizer_fingerprint[:12],
        "number of tokens": model.vocabulary_size,
        "first token": (model.stepwise(1).start_id, model.forced_id),
        "number of positions": model.position_limit,
        "sentences": model.sentences or "none",
        **{option: getattr(model.config, option) for option in ("src_lang", "tgt_lang", "src_prefix")},
    }


def _next_step(model: KeyedModel, batch: Batch, sentence: Tensor, tokens: Tensor) -> Step:
    """What a model predicts after tokens of shape (R, T), the start included."""
    labels = F.pad(tokens[:, 1:], (0, 1), value=model.pad_id)  # the last is what is to be predicted
    rows = replace(
        batch, input_ids=batch.input_ids[sentence], attention_mask=batch.attention_mask[sentence], labels=labels
    )
    keys, logits = model.keys_and_logits(rows)
    return Step(keys[:, -1], logits[:, -1].float(), sentence)
