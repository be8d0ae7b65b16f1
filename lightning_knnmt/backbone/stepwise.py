"""Encoder-decoder models, decoded one step at a time."""

from typing import Any, cast

from torch import LongTensor, Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.firefox.cache import FirefoxCache
from lightning_knnmt.backbone.pretrained import PretrainedModel


class Seq2SeqStepwise:
    """The state of decoding R = B × beams rows: encoder states, and what the decoder remembers.

    Args:
        owner: The model.
        start_id: The decoder's first input.
        batch: B sentences.
        beams: Rows of each sentence.
    """

    def __init__(self, owner: PretrainedModel, start_id: int, batch: Batch, beams: int) -> None:
        self.owner, self.start_id = owner, start_id
        self._model: Any = owner.model
        encoded = self._model.get_encoder()(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
        self._states = encoded[0].repeat_interleave(beams, 0)  # [B, S, D] -> [R, S, D]
        self._mask = batch.attention_mask.repeat_interleave(beams, 0)
        if self._model.config.model_type == "firefox":
            self._cache: Any = FirefoxCache(beams)
        else:
            config = self._model.config.get_text_config(decoder=True)
            self._cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))

    def step(self, sequences: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (R, D) and logits (R, V) of the token that follows sequences (R, T), of which the last is new."""
        inputs = self._model.prepare_inputs_for_generation(
            sequences,
            next_sequence_length=1,
            past_key_values=self._cache,
            attention_mask=self._mask,
            encoder_outputs=BaseModelOutput(last_hidden_state=self._states),
            use_cache=True,
        )
        with self.owner.tap() as tap:
            output = self._model(**inputs, return_dict=True)
        self._cache = output.past_key_values
        return tap.latest[:, -1], output.logits[:, -1]

    def select(self, rows: Tensor, dropped: bool) -> None:
        """Let row i go on from row `rows[i]`; what beams of a sentence have in common moves only if sentences left."""
        if dropped:
            self._cache.batch_select_indices(rows)
            self._states, self._mask = self._states[rows], self._mask[rows]
        elif isinstance(self._cache, EncoderDecoderCache):
            self._cache.self_attention_cache.reorder_cache(cast(LongTensor, rows))
        else:
            self._cache.reorder_cache(rows)
