"""Pretrained Hugging Face language models: a decoder alone, which sees a source and continues it with the target."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.families import family_of, position_limit
from lightning_knnmt.backbone.gguf import load_causal, loading_options
from lightning_knnmt.backbone.keyed_model import TokenIds
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.checks import check_one_of


class CausalModel(PretrainedModel):
    """A decoder-only language model (kNN-LM, arXiv 1911.00172): GPT-2, Llama, Qwen and what has their structure.

    A pair's source is context, which is read and makes no entries; its target continues it, and each of its tokens is
    one. No target ends in a token of its own, since windows of a document go on in the next one.

    Args:
        config: Hub name, folder or .gguf file, key type, device and type of the weights.

    Raises:
        ValueError: An option does not fit the model.
        OSError: There is no such file or folder, and the hub has no such model or cannot be reached.
        ImportError: The model is a .gguf file and the package that reads it is not installed.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        for option in ("src_lang", "tgt_lang"):
            if (code := getattr(config, option)) is not None:
                raise ValueError(f"{option} is {code!r}, but {self.name!r} is a language model; leave it out")
        check_one_of(("auto", "none"), sentences=config.sentences)  # windows are not cut any further
        options = {**loading_options(config.model), "trust_remote_code": False}
        hub = AutoConfig.from_pretrained(**options)
        self.family = family_of(hub, self.name)
        self.position_limit = position_limit(hub)
        self.tokenizer = AutoTokenizer.from_pretrained(**options)
        self._begins = _first_ids(self.tokenizer)
        self._start_id = _start_id(self.tokenizer, self.name)
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.convert_ids_to_tokens(self._start_id)
        self.place(load_causal(config.model, hub, getattr(torch, config.dtype)))

    def tokenize(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> TokenIds:
        """Token ids of contexts and, where given, of what continues them.

        A target is tokenized behind its context, as the whole text would be. An empty context is the token that begins
        or, if there is none, ends a text. What is too long loses the beginning of its context first.
        """
        contexts = [self.config.src_prefix + text for text in sources]
        targets = [""] * len(contexts) if (alone := targets is None) else list(targets or ())
        both = [context + target for context, target in zip(contexts, targets, strict=True)]
        if not both:
            return TokenIds([], [], 0)
        found = self.tokenizer(both, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        src: list[list[int]] = []
        tgt: list[list[int]] = []
        cut = 0
        for context, ids, spans in zip(contexts, found.input_ids, found.offset_mapping, strict=True):
            middle = len(ids) if alone else sum(start < len(context) for start, _ in spans)
            before, after, was_cut = self._fit(ids[:middle], ids[middle:])
            src.append(before)
            tgt.append(after)
            cut += was_cut
        return TokenIds(src, [] if alone else tgt, cut)

    def _fit(self, src: list[int], tgt: list[int]) -> tuple[list[int], list[int], bool]:
        """Context and continuation within the model's positions, and whether something had to go."""
        first = self._begins or ([] if src else [self._start_id])
        if self.position_limit is None or len(first) + len(src) + len(tgt) <= self.position_limit:
            return first + src, tgt, False
        tgt = tgt[: self.position_limit - max(1, len(first))]
        room = self.position_limit - len(first) - len(tgt)
        return first + src[len(src) - room :], tgt, True

    def batch(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> Batch:
        """Tokenize and pad B contexts and continuations, on the model's device."""
        ids = self.tokenize(sources, targets)
        return collate(ids.src, None if targets is None else ids.tgt, self.pad_id, ids.cut).to(self.device)

    def forward(self, batch: Batch) -> Tensor:
        """Logits of the targets' tokens in a teacher-forced pass, shape (B, T, V).

        Raises:
            ValueError: The batch has no labels.
        """
        states = self.model.base_model(input_ids=_joined(batch, self.pad_id), use_cache=False).last_hidden_state
        return self.output_projection(_before_targets(states, batch))  # [B, L, D] -> [B, T, D] -> [B, T, V]

    def keys(self, batch: Batch) -> Tensor:
        """Keys of a teacher-forced pass, shape (B, T, D): position t holds the state that predicts label t."""
        return self._at_targets(super().keys(batch), batch)

    def keys_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys and logits of one teacher-forced pass, shapes (B, T, D) and (B, T, V)."""
        keys, logits = super().keys_and_logits(batch)
        return self._at_targets(keys, batch), logits

    def _at_targets(self, keys: Tensor, batch: Batch) -> Tensor:
        """Keys at the targets, of whatever the tap has seen: the output projection sees nothing else."""
        return keys if self.config.key_type == "decoder_output" else _before_targets(keys, batch)

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Hugging Face's `generate` without the contexts, shape (sequences, 1 + T); the first token is padding.

        A context that leaves no room for `max_new_tokens` loses its beginning.
        """
        length = batch.input_ids.shape[1]
        if self.position_limit is not None:
            length = min(length, max(1, self.position_limit - options.get("max_new_tokens", 0)))
        ids, mask = _left_padded(batch, length)
        options.setdefault("pad_token_id", self.pad_id)
        model: Any = self.model
        with torch.inference_mode():
            sequences = model.generate(input_ids=ids, attention_mask=mask, **options)[:, length:]
        return torch.cat([sequences.new_full((len(sequences), 1), self.pad_id), sequences], dim=1)


def _first_ids(tokenizer: Any) -> list[int]:
    """The token that a tokenizer puts before every text, if it does."""
    first = tokenizer("a").input_ids[:1]
    return first if first == [tokenizer.bos_token_id] else []


def _start_id(tokenizer: Any, name: str) -> int:
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    raise ValueError(f"the tokenizer of {name!r} has neither a bos_token nor an eos_token to begin texts with; set one")


def _joined(batch: Batch, pad_id: int) -> Tensor:
    """Each context with its target but for the last token, right-padded, shape (B, L)."""
    sources, labels = batch.attention_mask.sum(1, keepdim=True), batch.target_labels  # [B, 1], [B, T]
    longest = int((sources + batch.target_mask.sum(1, keepdim=True)).max()) - 1
    place = torch.arange(longest, device=labels.device).expand(len(labels), -1)  # [B, L]
    of_source = batch.input_ids.gather(1, place.clamp(max=batch.input_ids.shape[1] - 1))
    of_target = labels.gather(1, (place - sources).clamp(0, labels.shape[1] - 1))
    joined = torch.where(place < sources, of_source, of_target)
    return joined.masked_fill(joined < 0, pad_id)


def _before_targets(states: Tensor, batch: Batch) -> Tensor:
    """The states that predict the targets' tokens: (B, L, D) -> (B, T, D)."""
    steps = torch.arange(batch.target_labels.shape[1], device=states.device)
    place = batch.attention_mask.sum(1, keepdim=True) - 1 + steps  # [B, T]
    place = place.clamp(max=states.shape[1] - 1)  # padding, whose states have no meaning
    return states.gather(1, place.unsqueeze(2).expand(-1, -1, states.shape[2]))


def _left_padded(batch: Batch, length: int) -> tuple[Tensor, Tensor]:
    """The last tokens of contexts that are right-padded, and their mask, both left-padded, shape (B, length)."""
    lengths = batch.attention_mask.sum(1, keepdim=True)  # [B, 1]
    place = torch.arange(length, device=lengths.device) - length + lengths  # [B, length]
    mask = (place >= 0).long()
    return batch.input_ids.gather(1, place.clamp(min=0)), mask
