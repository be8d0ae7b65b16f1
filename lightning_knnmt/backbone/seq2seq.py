"""Pretrained Hugging Face translation models: encoder and decoder."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.families import family_of, position_limit, splitter_of
from lightning_knnmt.backbone.firefox.shortlist import SHORTLIST_FILE, Shortlist, read_shortlist
from lightning_knnmt.backbone.hub import read_config, read_weights
from lightning_knnmt.backbone.keyed_model import TokenIds
from lightning_knnmt.backbone.languages import check_target_prefix, decoder_start, set_languages
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.backbone.row_decoder import RowDecoder
from lightning_knnmt.backbone.tokenization import token_ids
from lightning_knnmt.checks import check_texts


class Seq2SeqModel(PretrainedModel):
    """An encoder-decoder translation model: BART, Marian, M2M100/NLLB, mBART, Pegasus, T5, mT5, umT5 or FSMT.

    Args:
        config: Hub name or folder, languages, key type, device and type of the weights.

    Raises:
        ValueError: An option does not fit the model.
        OSError: There is no such folder, and the hub has no such model or cannot be reached.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__(config)
        hub = read_config(config.model)
        self.family = family_of(hub, self.name)
        self.position_limit = position_limit(hub)
        self.splitter = splitter_of(hub, config.sentences)
        self.tokenizer = self.family.tokenizer.from_pretrained(config.model, trust_remote_code=False)
        set_languages(self.tokenizer, self.name, config.src_lang, config.tgt_lang)
        check_target_prefix(self.tokenizer, self.name, config.src_prefix)
        self.place(read_weights(AutoModelForSeq2SeqLM, config.model, config.dtype))
        start = decoder_start(self.model, self.tokenizer, config.tgt_lang)
        self.start_id, self.forced_id = start.start_id, start.forced_id

    def tokenize(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> TokenIds:
        """Token ids of sources and, where given, of targets; what is longer than the positions is cut and counted."""
        check_texts(sources=sources, targets=targets)
        prefixed = [self.config.src_prefix + text for text in sources]
        src, cut = token_ids(self.tokenizer, "text", prefixed, self.position_limit)
        if targets is None:
            return TokenIds(src, [], cut)
        tgt, cut_targets = token_ids(self.tokenizer, "text_target", targets, self.position_limit)
        return TokenIds(src, tgt, cut + cut_targets)

    def batch(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> Batch:
        """Tokenize and pad B sentences, on the model's device."""
        ids = self.tokenize(sources, targets)
        labels = None if targets is None else ids.tgt
        return collate(ids.src, labels, self.pad_id, ids.cut, sources).to(self.device)

    def encoder_states(self, batch: Batch) -> Tensor:
        """States of the source tokens, shape (B, S, width of the encoder)."""
        encoder: Any = self.model.get_encoder()
        return cast(Tensor, encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask)[0])

    def forward(self, batch: Batch) -> Tensor:
        """Logits of a teacher-forced pass, shape (B, T, V).

        Raises:
            ValueError: The batch has no labels.
        """
        labels = batch.target_labels.masked_fill(~batch.target_mask, self.pad_id)
        start = labels.new_full((len(labels), 1), self.start_id)
        output = self.model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            decoder_input_ids=torch.cat([start, labels[:, :-1]], dim=1),
            use_cache=False,
        )
        return cast(Tensor, output.logits)

    def search_rules(self) -> tuple[Any, dict[str, Any]]:
        """The Hugging Face model, and the token that every translation begins with, if it is forced."""
        return self.model, {} if self.forced_id is None else {"forced_bos_token_id": self.forced_id}

    def stepwise(self, beams: int) -> RowDecoder:
        """Decoding one step at a time."""
        return self.family.decoder(self, beams)

    def shortlist(self) -> Shortlist | None:
        """The table of the model's folder; None: there is none."""
        return self._shortlist

    @cached_property
    def _shortlist(self) -> Shortlist | None:
        file = Path(self.name, SHORTLIST_FILE)
        return read_shortlist(file, self.vocabulary_size - 1) if file.is_file() else None

    @property
    def shares_vocabulary(self) -> bool:
        """Whether a source token may be copied, since the target has the same vocabulary."""
        return bool(getattr(self.model.config, "share_encoder_decoder_embeddings", True))

    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Hugging Face's `generate`, begun as the target language asks, shape (sequences, T)."""
        options.setdefault("decoder_start_token_id", self.start_id)
        if self.forced_id is not None:
            options.setdefault("forced_bos_token_id", self.forced_id)
        model: Any = self.model
        with torch.inference_mode():
            return model.generate(input_ids=batch.input_ids, attention_mask=batch.attention_mask, **options)
