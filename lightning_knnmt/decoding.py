"""kNN-MT through Hugging Face's own `generate`, and translation of texts with it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.knn.combiners.fixed import Combiner
from lightning_knnmt.knn.retrievers.whole_store import Retriever
from lightning_knnmt.timing import Spans


@contextmanager
def knn_decoding(backbone: KeyedModel, retriever: Retriever, combiner: Combiner, spans: Spans) -> Iterator[None]:
    """Mix neighbors into the logits that the model returns, for every forward pass within the block.

    Beam search, sampling, forced tokens and every other option of `generate` act on the mixture, as they would on
    the plain model's prediction. With λ = 0 nothing is hooked.

    Args:
        backbone: The model.
        retriever: Where neighbors come from.
        combiner: How they are mixed in.
        spans: Receives the time of `search` and `mix`, counted in queries.
    """
    if not combiner.needs_neighbors:
        yield
        return
    with backbone.tap() as tap:

        def mix(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
            assert tap.keys is not None
            queries = tap.keys[:, -1]  # [R, T, D] -> [R, D]; T > 1 without a cache
            with spans.span("search", len(queries)):
                neighbors = retriever.retrieve(queries)
            with spans.span("mix", len(queries)):
                # In place: `generate` copies the logits before it uses them, and nobody else holds them.
                mixed = combiner(output.logits[:, -1], neighbors, in_place=True)
                output.logits = mixed.unsqueeze(1)  # [R, 1, V]
            return output

        handle = backbone.model.register_forward_hook(mix)
        try:
            yield
        finally:
            handle.remove()


@dataclass(frozen=True)
class Translations:
    """Translated texts, in the order of the sources.

    Attributes:
        texts: The translations.
        tokens: Target tokens produced, special tokens not counted.
        seconds: Time that decoding took.
        spans: Its parts.
    """

    texts: list[str]
    tokens: int
    seconds: float
    spans: Spans


_UNFIT_OPTIONS = {
    "num_beams": "expected it in beams",
    "max_new_tokens": "expected it in max_new_tokens of decoding itself",
    "return_dict_in_generate": "expected options that return token ids; call KeyedModel.generate for scores",
    "num_return_sequences": "expected one translation of each source; call KeyedModel.generate for more",
    "assistant_model": "expected one token at a time, since each needs its own neighbors",
    "prompt_lookup_num_tokens": "expected one token at a time, since each needs its own neighbors",
}


@dataclass(frozen=True)
class Decoding:
    """Options of decoding.

    Attributes:
        beams: Beam size; 1 is greedy.
        batch_size: Sentences decoded at a time.
        max_new_tokens: Longest translation, in tokens.
        options: Further options of Hugging Face's `generate` that produce one translation, a token at a time.
    """

    beams: int = 4
    batch_size: int = 32
    max_new_tokens: int = 256
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("beams", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        for name, advice in _UNFIT_OPTIONS.items():
            if self.options.get(name):
                raise ValueError(f"options has {name}: {self.options[name]!r}, {advice}")


class Translator:
    """Translates texts, with neighbors if it has a retriever.

    Args:
        backbone: The model.
        decoding: Beam size, batch size and length.
        retriever: Where neighbors come from; None: the plain model.
        combiner: How they are mixed in.

    Raises:
        ValueError: Only one of retriever and combiner is given, or the model has too few positions for the decoding.
    """

    def __init__(
        self,
        backbone: KeyedModel,
        decoding: Decoding,
        retriever: Retriever | None = None,
        combiner: Combiner | None = None,
    ) -> None:
        if (retriever is None) != (combiner is None):
            raise ValueError("retriever and combiner belong together: give both, or neither for the plain model")
        limit = backbone.position_limit
        if limit is not None and decoding.max_new_tokens > limit:
            raise ValueError(
                f"max_new_tokens is {decoding.max_new_tokens}, but {backbone.name} has {limit} positions; "
                f"expected at most {limit}"
            )
        self.backbone, self.decoding, self.retriever, self.combiner = backbone, decoding, retriever, combiner

    def translate(self, sources: Sequence[str]) -> Translations:
        """Translate texts, batched by length."""
        spans = Spans()
        order = sorted(range(len(sources)), key=lambda number: -len(sources[number]))
        texts = [""] * len(sources)
        tokens = 0
        for start in range(0, len(order), self.decoding.batch_size):
            numbers = order[start : start + self.decoding.batch_size]
            with spans.span("decode"):
                batch = self.backbone.batch([sources[number] for number in numbers])
                sequences = self.generate(batch, spans)
            decoded = self.backbone.tokenizer.batch_decode(sequences, skip_special_tokens=True)
            tokens += self._count(sequences)
            for number, text in zip(numbers, decoded, strict=True):
                texts[number] = text
        return Translations(texts, tokens, spans.seconds["decode"], spans)

    def generate(self, batch: Batch, spans: Spans) -> Tensor:
        """Token ids of the translations of a batch, shape (B, 1 + T); the first is the decoder's start."""
        if self.retriever is None or self.combiner is None:
            mixing: Any = nullcontext()
        else:
            self.retriever.begin(batch)
            mixing = knn_decoding(self.backbone, self.retriever, self.combiner, spans)
        with mixing:
            return self.backbone.generate(
                batch,
                num_beams=self.decoding.beams,
                max_new_tokens=self.decoding.max_new_tokens,
                **self.decoding.options,
            )

    def _count(self, sequences: Tensor) -> int:
        special = set(self.backbone.tokenizer.all_special_ids)
        return sum(token not in special for row in sequences.tolist() for token in row)
