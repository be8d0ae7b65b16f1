"""A pretrained Hugging Face translation model, its tokenizer, and the place where its keys are read."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.families import family_of, logits_bias
from lightning_knnmt.backbone.fingerprint import model_fingerprint, tokenizer_fingerprint

KeyType = Literal["decoder_output", "ffn_input"]
Dtype = Literal["float32", "bfloat16", "float16"]


class _KeysReached(Exception):
    """Ends a forward pass at the tap; nothing after it is needed."""


class KeyTap:
    """The most recent keys that passed the tap.

    Attributes:
        keys: Shape (B, T, D); None before the first pass.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None


class Backbone(nn.Module):
    """An encoder-decoder translation model whose decoder states serve as keys.

    Args:
        model: Hub name or folder of a Marian, M2M100/NLLB, mBART, T5 or FSMT model.
        key_type: `decoder_output`: what the output projection sees (arXiv 2509.16729). `ffn_input`: what the last
            decoder block's feed-forward layer sees (arXiv 2010.00710).
        src_lang: Language code of the source, for multilingual models.
        tgt_lang: Language code of the target, for multilingual models; decoding is forced to begin with it.
        dtype: Type of the weights.
        device: `auto`: the GPU if there is one.
    """

    def __init__(
        self,
        model: str,
        key_type: KeyType = "decoder_output",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
    ) -> None:
        super().__init__()
        if key_type not in get_args(KeyType):
            raise ValueError(f"key_type is {key_type!r}, expected one of {', '.join(get_args(KeyType))}")
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(Dtype))}")
        self.name = str(model)
        self.key_type: KeyType = key_type
        self.src_lang, self.tgt_lang = src_lang, tgt_lang
        languages = {key: code for key, code in (("src_lang", src_lang), ("tgt_lang", tgt_lang)) if code}
        self.tokenizer = AutoTokenizer.from_pretrained(model, **languages)
        for option, code in languages.items():
            if self.tokenizer.get_vocab().get(_language_token(self.tokenizer, code)) is None:
                raise ValueError(f"{option} is {code!r}, which the tokenizer of {self.name!r} has no token for")
        self.model = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        self.family = family_of(self.model)
        self.to(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def key_size(self) -> int:
        """D, the number of a key's dimensions."""
        return int(self.output_projection.weight.shape[1])

    @property
    def vocabulary_size(self) -> int:
        """V, the number of the output projection's rows."""
        return int(self.output_projection.weight.shape[0])

    @property
    def output_projection(self) -> nn.Linear:
        """The layer that turns decoder outputs into logits."""
        module = self.family.output_projection(self.model)
        assert isinstance(module, nn.Linear)
        return module

    @cached_property
    def model_fingerprint(self) -> str:
        """SHA-256 of the weight files."""
        return model_fingerprint(self.name)

    @cached_property
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary and normalisation."""
        return tokenizer_fingerprint(self.tokenizer)

    @property
    def pad_id(self) -> int:
        """The padding token's id."""
        return int(self.tokenizer.pad_token_id)

    def tokenize(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> tuple[list[list[int]], ...]:
        """Token ids of sources and, where given, of targets, special tokens included."""
        limit = getattr(self.model.config, "max_position_embeddings", None)
        options = {"truncation": limit is not None, "max_length": limit}
        source_ids = self.tokenizer(list(sources), **options).input_ids
        if targets is None:
            return (source_ids,)
        return source_ids, self.tokenizer(text_target=list(targets), **options).input_ids

    def batch(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> Batch:
        """Tokenize and pad B sentences, on the model's device."""
        ids = self.tokenize(sources, targets)
        return collate(ids[0], ids[1] if len(ids) > 1 else None, self.pad_id).to(self.device)

    @contextmanager
    def tap(self, stop: bool = False) -> Iterator[KeyTap]:
        """Listen to the keys of every forward pass within the block.

        Args:
            stop: End each forward pass as soon as its keys are there.

        Yields:
            The tap; its `keys` have the shape (B, T, D) of the latest pass.
        """
        tap = KeyTap()
        decoder_output = self.key_type == "decoder_output"
        module = (self.family.output_projection if decoder_output else self.family.feed_forward)(self.model)
        time_first = self.family.time_first and not decoder_output

        def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            keys = inputs[0].transpose(0, 1) if time_first else inputs[0]  # [T, B, D] -> [B, T, D]
            tap.keys = keys
            if stop:
                raise _KeysReached

        handle = module.register_forward_pre_hook(hear)
        try:
            yield tap
        finally:
            handle.remove()

    def keys(self, batch: Batch) -> Tensor:
        """Keys of a teacher-forced pass: position t holds the state that predicts label t.

        Args:
            batch: B sentences with labels of shape (B, T).

        Returns:
            Shape (B, T, D), in the model's type; positions where the label is padding have no meaning.
        """
        with self.tap(stop=True) as tap:
            try:
                self._forward(batch)
            except _KeysReached:
                pass
        assert tap.keys is not None
        return tap.keys

    def project(self, states: Tensor) -> Tensor:
        """Logits of decoder outputs: (..., D) -> (..., V)."""
        projection = self.output_projection
        bias = projection.bias if (constant := logits_bias(self.model)) is None else constant.view(-1)
        return F.linear(states, projection.weight, bias)

    def keys_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys and logits of one teacher-forced pass, shapes (B, T, D) and (B, T, V)."""
        with self.tap() as tap:
            logits = self._forward(batch)
        assert tap.keys is not None
        return tap.keys, logits

    def _forward(self, batch: Batch) -> Tensor:
        if batch.labels is None:
            raise ValueError("the batch has no labels, expected a batch made with target texts")
        labels = batch.labels.masked_fill(~batch.target_mask, self.pad_id)
        if self.family.explicit_shift:
            targets = {"decoder_input_ids": self.model.prepare_decoder_input_ids_from_labels(labels)}
        else:
            targets = {"labels": labels}
        output = self.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **targets
        )
        return output.logits

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Hugging Face's `generate` with the target language's token forced, shape (sequences, T)."""
        if self.tgt_lang and "forced_bos_token_id" not in options:
            options["forced_bos_token_id"] = self.tokenizer.get_vocab()[_language_token(self.tokenizer, self.tgt_lang)]
        with torch.inference_mode():
            return self.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)

    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _language_token(tokenizer: Any, code: str) -> str:
    """The token of a language code: `__de__` for M2M100, the code itself for NLLB and mBART."""
    lang_tokens = getattr(tokenizer, "lang_code_to_token", {})
    return lang_tokens.get(code, code)
