"""Translation of texts with a mixture, through the model's own `generate`."""

import itertools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_at_least, check_one_of, check_texts
from lightning_knnmt.data.sentences import join
from lightning_knnmt.decoding.search import search, search_options
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.step import Step, sentences_of_rows
from lightning_knnmt.timing import Spans


@dataclass(frozen=True)
class Translations:
    """Translated texts, in the order of the sources.

    Attributes:
        texts: The translations.
        tokens: Target tokens produced, special tokens not counted.
        seconds: Time that decoding took.
        spans: Its parts.
        cut: Sources that were longer than the model's positions, and were cut.
    """

    texts: list[str]
    tokens: int
    seconds: float
    spans: Spans
    cut: int = 0


_UNFIT_OPTIONS = {
    "num_beams": "expected it in beams",
    "max_new_tokens": "expected it in max_new_tokens of decoding itself",
    "return_dict_in_generate": "expected options that return token ids; call KeyedModel.generate for scores",
    "num_return_sequences": "expected one translation of each source; call KeyedModel.generate for more",
    "assistant_model": "expected one token at a time, since each needs its own neighbors",
    "prompt_lookup_num_tokens": "expected one token at a time, since each needs its own neighbors",
}
_NUMBERS = (
    "length_penalty", "min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty", "temperature",
    "top_k", "top_p",
)  # fmt: skip


Loop = Literal["own", "generate"]


@dataclass(frozen=True)
class Decoding:
    """Options of decoding.

    Attributes:
        beams: Beam size; 1 is greedy.
        batch_size: Sentences decoded at a time.
        max_new_tokens: Longest translation, in tokens.
        options: Further options of Hugging Face's `generate` that produce one translation, a token at a time.
        loop: `own`: a search that gives what `generate` gives and is faster, wherever model and options allow it;
            `generate`: Hugging Face's own, always.
    """

    beams: int = 4
    batch_size: int = 32
    max_new_tokens: int = 256
    options: dict[str, Any] = field(default_factory=dict)
    loop: Loop = "own"

    def __post_init__(self) -> None:
        check_at_least(1, beams=self.beams, batch_size=self.batch_size, max_new_tokens=self.max_new_tokens)
        check_one_of(get_args(Loop), loop=self.loop)
        for name, advice in _UNFIT_OPTIONS.items():
            if self.options.get(name):
                raise ValueError(f"options has {name}: {self.options[name]!r}, {advice}")
        for name in _NUMBERS:
            value = self.options.get(name)
            if value is not None and type(value) not in (int, float):
                raise ValueError(f"options has {name}: {value!r}, expected a number")


class Translator:
    """Translates texts with a model and a mixture.

    Args:
        model: The model.
        mixture: What is mixed into its prediction; the plain model if not given.
        decoding: Beam size, batch size and length.

    Raises:
        ValueError: The model has too few positions for the decoding.
    """

    def __init__(
        self, model: KeyedModel, mixture: Mixture | PlainModel = PlainModel(), decoding: Decoding = Decoding()
    ) -> None:
        limit = model.position_limit
        if limit is not None and decoding.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens is {decoding.max_new_tokens}, but {model.name} has {limit} positions; "
                f"expected at most {limit}"
            )
        self.model, self.mixture, self.decoding = model, mixture, decoding

    def translate(self, sources: Sequence[str]) -> Translations:
        """Translate texts, batched by length.

        Raises:
            TypeError: One string is given, not a list of them.
        """
        check_texts(sources=sources)
        spans = Spans()
        sentences = [self.model.split(text) for text in sources]
        pieces = [sentence.text for of_text in sentences for sentence in of_text]
        order = sorted(range(len(pieces)), key=lambda number: -len(pieces[number]))
        translated = [""] * len(pieces)
        tokens = cut = 0
        for start in range(0, len(order), self.decoding.batch_size):
            numbers = order[start : start + self.decoding.batch_size]
            with spans.span("decode"):
                batch = self.model.batch([pieces[number] for number in numbers])
                sequences = self.generate(batch, spans)
            decoded = self.model.tokenizer.batch_decode(sequences, skip_special_tokens=True)
            tokens += self._count(sequences)
            cut += batch.cut
            for number, text in zip(numbers, decoded, strict=True):
                translated[number] = text
        rest = iter(translated)
        texts = [join(itertools.islice(rest, len(of_text)), of_text) for of_text in sentences]
        return Translations(texts, tokens, spans.seconds["decode"], spans, cut)

    def generate(self, batch: Batch, spans: Spans) -> Tensor:
        """Token ids of the translations of a batch, shape (B, 1 + T); the first is the decoder's start.

        Args:
            batch: B sentences.
            spans: Receives the time of `search` and `mix`, counted in rows.
        """
        beams, longest, options = self.decoding.beams, self.decoding.max_new_tokens, self.decoding.options
        rules = self.model.search_rules() if self.decoding.loop == "own" else None
        own = None if rules is None else search_options(rules[0], {**rules[1], **options}, beams, longest)
        if own is not None:
            _begin(self.mixture, batch, spans)
            with torch.inference_mode():
                decoder = self.model.stepwise(batch, beams)
                return search(decoder, lambda step: self.mixture.mixed(step, spans), len(batch), own)
        with mixing(self.model, self.mixture, batch, spans):
            return self.model.generate(batch, num_beams=beams, max_new_tokens=longest, **options)

    def _count(self, sequences: Tensor) -> int:
        special = set(self.model.tokenizer.all_special_ids)
        return sum(token not in special for row in sequences.tolist() for token in row)


def mixing(
    model: KeyedModel, mixture: Mixture | PlainModel, batch: Batch, spans: Spans | None = None
) -> AbstractContextManager[None]:
    """Let a mixture change what a model predicts for a batch, in every forward pass within the block.

    Args:
        model: The model.
        mixture: What is mixed into its prediction.
        batch: The B sentences that are decoded.
        spans: Receives the time of `gate`, `search` and `mix`, counted in rows.
    """
    _begin(mixture, batch, spans)

    def mix(queries: Tensor, logits: Tensor) -> Tensor:
        sentence = sentences_of_rows(len(queries), len(batch), queries.device)
        return mixture(Step(queries, logits, sentence, writable=True), spans)

    return nullcontext() if mixture.changes_nothing else model.mixing(mix)


def _begin(mixture: Mixture | PlainModel, batch: Batch, spans: Spans | None) -> None:
    """Prepare for a batch, which is a part of searching."""
    with nullcontext() if spans is None or mixture.changes_nothing else spans.span("search", 0):
        mixture.begin(batch)
