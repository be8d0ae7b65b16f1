"""Row decoding with a Hugging Face encoder-decoder model and its cache of keys and values."""

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.row_decoder import RowDecoder, States, reordered
from lightning_knnmt.backbone.tap import KeysReached, tap_input

if TYPE_CHECKING:
    from lightning_knnmt.backbone.seq2seq import Seq2SeqModel


class CachedDecoder(RowDecoder):
    """Calls the model's own forward pass, which ends before the output projection.

    Keys and values of the source are the same for all rows of a sentence: they change only when sentences leave. All
    rows stand at the same position, so that no sentence can enter later.

    Args:
        backbone: The model.
        beams: Rows of each sentence.
    """

    def __init__(self, backbone: "Seq2SeqModel", beams: int) -> None:
        self.start_id = backbone.start_id
        self._backbone, self._model, self._beams = backbone, backbone.model, beams
        config: Any = self._model.config.get_text_config(decoder=True)
        self._cache = EncoderDecoderCache(DynamicCache(config=config), DynamicCache(config=config))
        self._source: Tensor | None = None
        self._mask: Tensor | None = None

    def enter(self, batch: Batch) -> None:
        """Encode B sentences.

        Raises:
            ValueError: There are others already.
        """
        if self._source is not None:
            raise ValueError("sentences are decoded already, expected none: all rows stand at the same position")
        encoder: Any = self._model.get_encoder()
        states = encoder(input_ids=batch.input_ids, attention_mask=batch.attention_mask, return_dict=True)[0]
        self._source = states.repeat_interleave(self._beams, 0)  # [B, S, D] -> [R, S, D]
        self._mask = batch.attention_mask.repeat_interleave(self._beams, 0)

    def step(self, tokens: Tensor) -> States:
        """Take the latest token of each row, shape (R,), and stand before the next."""
        with ExitStack() as taps:
            queries = taps.enter_context(self._backbone.tap())
            outputs = taps.enter_context(tap_input(self._backbone.output_projection, stop=True))
            with suppress(KeysReached):
                self._model(
                    encoder_outputs=BaseModelOutput(last_hidden_state=self._source),
                    attention_mask=self._mask,
                    decoder_input_ids=tokens[:, None],
                    past_key_values=self._cache,
                    use_cache=True,
                )
        return States(queries.latest[:, -1], outputs.latest[:, -1])  # [R, 1, D] -> [R, D]

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Let rows go on from former rows of the same sentence; what is not named leaves."""
        _reorder(self._cache.self_attention_cache, rows)
        if sentences is not None and self._source is not None and self._mask is not None:
            self._source, self._mask = self._source.index_select(0, rows), self._mask.index_select(0, rows)
            _reorder(self._cache.cross_attention_cache, rows)


def _reorder(cache: Any, rows: Tensor) -> None:
    for layer in cache.layers:
        layer.keys, layer.values = reordered(layer.keys, rows), reordered(layer.values, rows)
