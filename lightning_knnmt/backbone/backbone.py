"""A pretrained Hugging Face translation model, its tokenizer, and the place where its keys are read."""

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.families import family_of, logits_bias, position_limit
from lightning_knnmt.backbone.fingerprint import model_fingerprint, tokenizer_fingerprint
from lightning_knnmt.backbone.languages import decoder_start, set_languages
from lightning_knnmt.backbone.output_path import add_adapters, saved_state, untie
from lightning_knnmt.backbone.tap import KeysReached, KeyTap, tap_input
from lightning_knnmt.backbone.tokenization import token_ids

log = logging.getLogger(__name__)

KeyType = Literal["decoder_output", "ffn_input"]
Dtype = Literal["float32", "bfloat16", "float16"]


class Backbone(nn.Module):
    """An encoder-decoder translation model whose decoder states serve as keys.

    Args:
        model: Hub name or folder of a Marian, M2M100/NLLB, mBART, T5 or FSMT model.
        key_type: `decoder_output`: what the output projection sees (arXiv 2509.16729). `ffn_input`: what the last
            decoder block's feed-forward layer sees (arXiv 2010.00710).
        src_lang: Language code of the source, for multilingual models.
        tgt_lang: Language code of the target, for multilingual models; decoding begins with it.
        dtype: Type of the weights.
        device: `auto`: the GPU if there is one.
        src_prefix: Put before every source, such as T5's `translate German to English: `.

    Attributes:
        cut_texts: How many texts were longer than the model's positions so far.
        frozen: Whether only the way from the last decoder block to the logits can be trained.

    Raises:
        ValueError: An option does not fit the model.
        OSError: There is no such folder, and the hub has no such model or cannot be reached.
    """

    def __init__(
        self,
        model: str,
        key_type: KeyType = "decoder_output",
        src_lang: str | None = None,
        tgt_lang: str | None = None,
        dtype: Dtype = "float32",
        device: str = "auto",
        src_prefix: str = "",
    ) -> None:
        super().__init__()
        if key_type not in get_args(KeyType):
            raise ValueError(f"key_type is {key_type!r}, expected one of {', '.join(get_args(KeyType))}")
        if dtype not in get_args(Dtype):
            raise ValueError(f"dtype is {dtype!r}, expected one of {', '.join(get_args(Dtype))}")
        self.name = str(model)
        self.key_type: KeyType = key_type
        self.src_lang, self.tgt_lang = src_lang, tgt_lang
        self.src_prefix = src_prefix
        try:
            config = AutoConfig.from_pretrained(model)
        except OSError as error:
            raise OSError(
                f"model {self.name!r} is no folder with a config.json here, and the hub gave none of that name: {error}"
            ) from error
        self.family = family_of(config, self.name)
        self.position_limit = position_limit(config)
        self.cut_texts = 0
        self.frozen = False
        self.tokenizer = self.family.tokenizer.from_pretrained(model)
        set_languages(self.tokenizer, self.name, src_lang, tgt_lang)
        self.model = AutoModelForSeq2SeqLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
        for name in self.model._keys_to_ignore_on_save or ():  # tables that are computed anew at each loading
            self.model.get_parameter(name).requires_grad_(False)
        self.start = decoder_start(self.model, self.tokenizer, tgt_lang)
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
        return cast(nn.Linear, self.family.output_projection(self.model))  # or a wrapper with the same attributes

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
        """Token ids of sources and, where given, of targets, special tokens included.

        Texts longer than the model's positions are cut, counted in `cut_texts`, and reported once.
        """
        sources = [self.src_prefix + text for text in sources]
        source_ids, cut = token_ids(self.tokenizer, "text", sources, self.position_limit)
        if targets is None:
            self._count_cut(cut, len(sources))
            return (source_ids,)
        target_ids, cut_targets = token_ids(self.tokenizer, "text_target", targets, self.position_limit)
        self._count_cut(cut + cut_targets, len(sources) + len(targets))
        return source_ids, target_ids

    def _count_cut(self, cut: int, texts: int) -> None:
        if cut and not self.cut_texts:
            log.warning(
                "%d of %d texts have more tokens than the %d positions of %s and were cut; "
                "more of them are not reported, only counted",
                cut, texts, self.position_limit, self.name,
            )  # fmt: skip
        self.cut_texts += cut

    def batch(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> Batch:
        """Tokenize and pad B sentences, on the model's device."""
        ids = self.tokenize(sources, targets)
        return collate(ids[0], ids[1] if len(ids) > 1 else None, self.pad_id).to(self.device)

    def tap(self, stop: bool = False) -> AbstractContextManager[KeyTap]:
        """Listen to the keys of every forward pass within the block.

        Args:
            stop: End each forward pass with `KeysReached` as soon as its keys are there.

        Returns:
            A context that gives the tap; its `keys` have the shape (B, T, D) of the latest pass.
        """
        if self.key_type == "decoder_output":
            return tap_input(self.output_projection, stop=stop)
        return tap_input(self.family.feed_forward(self.model), self.family.time_first, stop)

    def keys(self, batch: Batch) -> Tensor:
        """Keys of a teacher-forced pass: position t holds the state that predicts label t.

        Args:
            batch: B sentences with labels of shape (B, T).

        Returns:
            Shape (B, T, D), in the model's type; positions where the label is padding have no meaning.
        """
        with self.tap(stop=True) as tap, suppress(KeysReached):
            self._forward(batch)
        assert tap.keys is not None
        return tap.keys

    def project(self, states: Tensor) -> Tensor:
        """Logits of decoder outputs: (..., D) -> (..., V)."""
        projection, constant = self.output_projection, logits_bias(self.model)
        if not isinstance(projection, nn.Linear):  # with an adapter beside its weight
            return projection(states) if constant is None else projection(states) + constant.view(-1)
        return F.linear(states, projection.weight, projection.bias if constant is None else constant.view(-1))

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
        start = labels.new_full((len(labels), 1), self.start.start_id)
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1),
            use_cache=False,
        )
        return output.logits

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Hugging Face's `generate`, begun as the target language asks, shape (sequences, T)."""
        options.setdefault("decoder_start_token_id", self.start.start_id)
        if self.start.forced_id is not None:
            options.setdefault("forced_bos_token_id", self.start.forced_id)
        with torch.inference_mode():
            return self.model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)

    def freeze_below_output(self, adapter_rank: int | None = None) -> None:
        """Leave only the way from the last decoder block to the logits trainable, as in arXiv 2509.16729.

        Trainable are the feed-forward layers of the last decoder block, the norm that makes the decoder's outputs, and
        the output projection, which is untied from the embeddings. In training mode the last block keeps its dropout;
        everything before it runs as in decoding, so that what is trained sees the states that it will see.

        Args:
            adapter_rank: Train low-rank adapters of that rank (LoRA, arXiv 2106.09685) in place of the linear layers'
                weights.
        """
        untie(self.model, self.output_projection)
        self.model.requires_grad_(False)
        self.family.final_norm(self.model).requires_grad_(True)
        layers = [*self.family.feed_forward_layers(self.model), self.output_projection]
        if adapter_rank is None:
            for layer in layers:
                layer.requires_grad_(True)
        else:
            add_adapters(self.model, layers, adapter_rank)
        self.frozen = True
        self.train(self.training)

    def train(self, mode: bool = True) -> "Backbone":
        """Switch dropout on or off; in what is frozen it stays off."""
        super().train(mode)
        if mode and self.frozen:
            self.model.eval()
            self.family.last_block(self.model).train()
        return self

    def save(self, folder: Path) -> None:
        """Write the model, adapters merged, and its tokenizer as a Hugging Face folder."""
        self.model.save_pretrained(folder, state_dict=saved_state(self.model))
        self.tokenizer.save_pretrained(folder)
