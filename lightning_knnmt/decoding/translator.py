"""Translation of texts with a mixture: by the own search where it knows all options, else by the model's `generate`."""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_at_least, check_one_of, check_texts
from lightning_knnmt.data.sentences import join
from lightning_knnmt.decoding.batch_size import DEFAULT, SENTENCES, BatchSize, evenly
from lightning_knnmt.decoding.candidates import Candidates
from lightning_knnmt.decoding.options import SearchOptions, search_options
from lightning_knnmt.decoding.prediction import Predictor
from lightning_knnmt.decoding.projection import Projection
from lightning_knnmt.decoding.search import Waiting, search
from lightning_knnmt.decoding.shortlist import open_shortlist
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


_Decoded = tuple[list[int], list[Tensor], int]
Loop = Literal["own", "generate"]
ENTERING = 4  # a fraction of the batch: so many sentences enter at a time, since an encoder likes company


@dataclass(frozen=True)
class Decoding:
    """Options of decoding.

    Attributes:
        beams: Beam size; 1 is greedy.
        batch_size: Sentences decoded at a time; `auto`: 8, 16, 32, … are tried on the first texts, each on others, and
            the one with the most tokens a second decodes the rest (with fewer than some hundred sentences: 32).
            Translations do not depend on it.
        max_new_tokens: Longest translation, in tokens.
        options: Further options of Hugging Face's `generate` that produce one translation, a token at a time.
        loop: `own`: a search that gives what `generate` gives and is faster, wherever model and options allow it;
            `generate`: Hugging Face's own, always.
        shortlist: Predict only tokens that are likely for the sources, and those that neighbors bring, by a table:
            `model`: the lexical shortlist that models of Firefox Translations come with; a .npz file: one learned from
            a translation memory (`learn_shortlist`); None: the whole vocabulary. It needs the own loop.
    """

    beams: int = 4
    batch_size: int | Literal["auto"] = DEFAULT
    max_new_tokens: int = 256
    options: dict[str, Any] = field(default_factory=dict)
    loop: Loop = "own"
    shortlist: str | None = None

    def __post_init__(self) -> None:
        check_at_least(1, beams=self.beams, max_new_tokens=self.max_new_tokens)
        if self.batch_size != "auto":
            if isinstance(self.batch_size, str):
                raise ValueError(f"batch_size is {self.batch_size!r}, expected auto or a number")
            check_at_least(1, batch_size=self.batch_size)
        check_one_of(get_args(Loop), loop=self.loop)
        if self.shortlist is not None and self.loop == "generate":
            raise ValueError(f"shortlist is {self.shortlist} and loop is generate, expected loop own")
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
        if mixture.follows and decoding.beams > 1:
            raise ValueError(
                f"beams is {decoding.beams}, but the retriever goes on from the row before in each text; expected 1"
            )
        self.model, self.mixture, self.decoding = model, mixture, decoding
        self._measured = BatchSize()
        self._project = Projection(model)
        self._likely = None if decoding.shortlist is None else open_shortlist(model, decoding.shortlist)
        if self._likely is not None and (self._options() is None or model.projection_weights() is None):
            raise ValueError(
                f"shortlist is {decoding.shortlist}, but only generate can decode {model.name} with these options; "
                "expected none"
            )

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
        for numbers, sequences, shortened in self._measuring(pieces, order, spans):
            decoded = self.model.tokenizer.batch_decode(sequences, skip_special_tokens=True)
            tokens += self._count(sequences)
            cut += shortened
            for number, text in zip(numbers, decoded, strict=True):
                translated[number] = text
        rest = iter(translated)
        texts = [join(itertools.islice(rest, len(of_text)), of_text) for of_text in sentences]
        return Translations(texts, tokens, spans.seconds["decode"], spans, cut)

    @property
    def batch_size(self) -> int:
        """Sentences decoded at a time; with `auto`, by what was measured so far."""
        chosen = self.decoding.batch_size
        return self._measured.best if isinstance(chosen, str) else chosen

    def _measuring(self, pieces: list[str], order: list[int], spans: Spans) -> Iterator[_Decoded]:
        """As `_sequences`, after trials of how many sentences to decode at a time where that is still to be chosen."""
        while self.decoding.batch_size == "auto" and (room := self._measured.next(len(order))) is not None:
            tried, order = evenly(order, SENTENCES * room)
            before, tokens = spans.seconds["decode"], 0
            for decoded in self._sequences(pieces, tried, spans, room):
                tokens += sum(map(len, decoded[1]))
                yield decoded
            self._measured.record(tokens, spans.seconds["decode"] - before)
        yield from self._sequences(pieces, order, spans, self.batch_size)

    def _sequences(self, pieces: list[str], order: list[int], spans: Spans, room: int) -> Iterator[_Decoded]:
        """Numbers of sentences, their translations' token ids, and how many were cut, batch by batch."""
        options = self._options()
        if options is not None and self._enter(options):
            cut = 0

            def batches() -> Iterator[tuple[Batch, Tensor]]:
                nonlocal cut
                each = max(1, room // ENTERING)
                for start in range(0, len(order), each):
                    batch = self.model.batch([pieces[number] for number in order[start : start + each]])
                    cut += batch.cut
                    yield batch, torch.tensor(order[start : start + each])

            with spans.span("decode"):
                found = search(self._predictor(options, spans), Waiting(batches(), room))
            yield list(found), list(found.values()), cut
            return
        for start in range(0, len(order), room):
            numbers = order[start : start + room]
            with spans.span("decode"):
                batch = self.model.batch([pieces[number] for number in numbers])
                sequences = self.generate(batch, spans)
            yield numbers, list(sequences), batch.cut

    def generate(self, batch: Batch, spans: Spans) -> Tensor:
        """Token ids of the translations of a batch, shape (B, 1 + T); the first is the decoder's start.

        Args:
            batch: B sentences.
            spans: Receives the time of the parts, counted in rows.
        """
        own = self._options()
        if own is not None:
            self._begin(batch, spans)
            waiting = Waiting(iter([(batch, torch.arange(len(batch)))]), len(batch))
            found = search(self._predictor(own, spans), waiting)
            longest = max(map(len, found.values()))
            return torch.stack([
                torch.cat([row, row.new_full((longest - len(row),), own.pad_id)]) for _, row in sorted(found.items())
            ])  # fmt: skip
        return self._generate(batch, spans)

    def _generate(self, batch: Batch, spans: Spans) -> Tensor:
        """The same by Hugging Face's `generate`."""
        decoding = self.decoding
        with mixing(self.model, self.mixture, batch, spans):
            return self.model.generate(
                batch, num_beams=decoding.beams, max_new_tokens=decoding.max_new_tokens, **decoding.options
            )

    def _begin(self, batch: Batch, spans: Spans) -> None:
        """Prepare the mixture for a batch."""
        _begin(self.mixture, batch, spans)

    def _options(self) -> SearchOptions | None:
        """What the own search goes by; None: only `generate` can do what is asked for."""
        decoding = self.decoding
        rules = self.model.search_rules() if decoding.loop == "own" else None
        if rules is None:
            return None
        return search_options(rules[0], {**rules[1], **decoding.options}, decoding.beams, decoding.max_new_tokens)

    def _predictor(self, options: SearchOptions, spans: Spans) -> Predictor:
        decoder = self.model.stepwise(options.beams)
        mixture = PlainModel() if self.mixture.changes_nothing else self.mixture
        return Predictor(decoder, self._project, mixture, options, spans, self._candidates(options))

    def _candidates(self, options: SearchOptions) -> Candidates | None:
        weights = self.model.projection_weights()
        if self._likely is None or weights is None:
            return None
        needed = (
            options.eos_ids
            if self.model.forced_id is None
            else F.pad(options.eos_ids, (0, 1), value=self.model.forced_id)
        )
        return Candidates(self._likely, needed, *weights)

    def _enter(self, options: SearchOptions) -> bool:
        """Whether sentences may enter a search as others leave it."""
        grows = self.model.stepwise(options.beams).grows
        return grows and not options.processors and not self.mixture.prepares

    def _count(self, sequences: list[Tensor]) -> int:
        special = set(self.model.tokenizer.all_special_ids)
        return sum(token not in special for row in sequences for token in row.tolist())


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

    steps = itertools.count()

    def mix(queries: Tensor, logits: Tensor, tokens: Tensor) -> Tensor:
        sentence = sentences_of_rows(len(queries), len(batch), queries.device)
        position = torch.full_like(sentence, next(steps))
        step = Step(queries, logits, sentence, writable=True, previous=tokens[:, -1], position=position)
        return mixture(step, spans)

    return nullcontext() if mixture.changes_nothing else model.mixing(mix)


def _begin(mixture: Mixture | PlainModel, batch: Batch, spans: Spans | None) -> None:
    """Prepare for a batch, which is a part of searching."""
    with nullcontext() if spans is None or mixture.changes_nothing else spans.span("search", 0):
        mixture.begin(batch)
