"""Firefox Translations models as Hugging Face models, which `generate` decodes with like any other."""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from lightning_knnmt.backbone.firefox.cache import FirefoxCache, SourceMemory
from lightning_knnmt.backbone.firefox.configuration import FirefoxConfig
from lightning_knnmt.backbone.firefox.layers import DecoderLayer, Embedding, EncoderLayer

UNUSED_BIAS = -50.0  # of rows that are no tokens: finite, or label smoothing's loss would not be


class FirefoxPreTrainedModel(PreTrainedModel):
    """What the model and its parts have in common."""

    config_class = FirefoxConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    _supports_sdpa = True
    _is_stateful = True  # so `generate` refuses assisted decoding
    _no_split_modules = ["EncoderLayer", "DecoderLayer"]  # noqa: RUF012, Hugging Face's own attribute

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
        if isinstance(bias := getattr(module, "bias", None), nn.Parameter):
            nn.init.zeros_(bias)


class FirefoxEncoder(FirefoxPreTrainedModel):
    """The encoder.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding = Embedding(config)
        self.layers: Any = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """States (B, S, D) of source ids (B, S).

        Raises:
            ValueError: Sources are padded on the left, or attention weights are asked for.
        """
        _refuse_attentions(self.config, output_attentions)
        mask = source_mask(attention_mask if attention_mask is not None else input_ids != self.config.pad_token_id)
        states = self.embedding(self.embed_tokens, input_ids)
        seen = [states]
        for layer in self.layers:
            states = layer(states, mask)
            seen.append(states)
        output = BaseModelOutput(states, tuple(seen) if _wanted(self.config, output_hidden_states) else None)
        return output if return_dict else output.to_tuple()


class FirefoxDecoder(FirefoxPreTrainedModel):
    """The decoder.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_model)
        self.embedding = Embedding(config)
        self.layers: Any = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.post_init()

    def memory(self, states: Tensor, attention_mask: Tensor | None) -> SourceMemory:
        """Keys and values of encoder states (B, S, D), for every block."""
        pairs = [layer.encoder_attn.keys_and_values(states) for layer in self.layers]
        mask = None if attention_mask is None else source_mask(attention_mask)
        return SourceMemory([keys for keys, _ in pairs], [values for _, values in pairs], mask)

    def forward(self, input_ids: Tensor, cache: FirefoxCache) -> list[Tensor]:
        """States (R, T, D) of target ids (R, T): embedded, and behind each block. The cache moves on by T tokens."""
        memory = cache.memory
        assert memory is not None, "the caller fills it"
        states = self.embedding(self.embed_tokens, input_ids, cache.length)
        seen: list[Tensor] = [states]
        cells: list[Any] = cache.cells or [None] * len(self.layers)
        for number, layer in enumerate(self.layers):
            states, cells[number] = layer(
                states, cells[number], memory.keys[number], memory.values[number], memory.mask
            )
            seen.append(states)
        cache.cells = cells
        cache.length += input_ids.shape[1]
        return seen


class FirefoxModel(FirefoxPreTrainedModel):
    """Encoder and decoder.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__(config)
        self.encoder = FirefoxEncoder(config)
        self.decoder = FirefoxDecoder(config)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The source's embeddings."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replace them, and the target's if both share them."""
        self.encoder.embed_tokens = value
        if self.config.share_encoder_decoder_embeddings:
            self.decoder.embed_tokens = value


class FirefoxForConditionalGeneration(FirefoxPreTrainedModel, GenerationMixin):
    """The translation model: Transformer encoder, SSRU decoder, and an output projection with a bias.

    Sources are padded on the right. The logits' last rows belong to padding, which is never produced.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__(config)
        self.model = FirefoxModel(config)
        self.lm_head = nn.Linear(config.d_model, config.vocab_size)
        self._tied_weights_keys = {"lm_head.weight": "model.decoder.embed_tokens.weight"}
        if config.share_encoder_decoder_embeddings:
            self._tied_weights_keys["model.encoder.embed_tokens.weight"] = "model.decoder.embed_tokens.weight"
        self.post_init()
        with torch.no_grad():  # of a new model; loading overwrites it
            self.lm_head.bias[config.pad_token_id] = UNUSED_BIAS

    def get_output_embeddings(self) -> nn.Module:
        """The output projection."""
        return self.lm_head

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replace it."""
        self.lm_head = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: FirefoxCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Logits (R, T, V) of target ids (R, T), all at once or going on from a cache.

        Args:
            input_ids: Source ids, shape (R, S), padded on the right.
            attention_mask: 1 for source tokens and 0 for padding, shape (R, S).
            decoder_input_ids: Target ids, shape (R, T); the first of a translation is `decoder_start_token_id`.
            decoder_attention_mask: Accepted where it hides nothing that a later token would see.
            encoder_outputs: What the encoder gave, in place of `input_ids`.
            past_key_values: What an earlier pass gave; the ids go on from there.
            labels: The tokens to be predicted, shape (R, T), -100 where there is none; gives the loss.
            use_cache: Whether to give the cache.
            output_attentions: Not available.
            output_hidden_states: Whether to give the states behind each block.
            return_dict: False: a tuple.

        Raises:
            ValueError: Padding on the left, another kind of cache, or attention weights asked for.
        """
        _refuse_attentions(self.config, output_attentions)
        if labels is not None:
            use_cache = False
            if decoder_input_ids is None:
                decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if decoder_input_ids is None:
            raise ValueError("decoder_input_ids and labels are missing, expected one of them")
        if decoder_attention_mask is not None:
            source_mask(decoder_attention_mask, "decoder_attention_mask")
        cache = FirefoxCache() if past_key_values is None else _own_cache(past_key_values)
        wanted = _wanted(self.config, output_hidden_states)
        if encoder_outputs is None and cache.memory is None:
            if input_ids is None:
                raise ValueError("input_ids and encoder_outputs are missing, expected one of them")
            encoder_outputs = self.model.encoder(input_ids, attention_mask, output_hidden_states=wanted)
        if cache.memory is None:
            if attention_mask is None and input_ids is not None:
                attention_mask = input_ids != self.config.pad_token_id
            each = cache.rows_per_source
            mask = None if attention_mask is None else attention_mask[::each]
            cache.memory = self.model.decoder.memory(encoder_outputs[0][::each], mask)
        seen = self.model.decoder(decoder_input_ids, cache)
        logits = self.lm_head(seen[-1])
        keep = self.config.use_cache if use_cache is None else use_cache
        output = Seq2SeqLMOutput(
            loss=None if labels is None else F.cross_entropy(logits.flatten(0, 1), labels.flatten()),
            logits=logits,
            past_key_values=cast(Any, cache) if keep else None,
            decoder_hidden_states=tuple(seen) if wanted else None,
            encoder_last_hidden_state=None if encoder_outputs is None else encoder_outputs[0],
            encoder_hidden_states=encoder_outputs.get("hidden_states") if wanted and encoder_outputs else None,
        )
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The labels (R, T) moved on by one behind the decoder's start."""
        start = labels.new_full((len(labels), 1), self.config.decoder_start_token_id)
        moved = torch.cat([start, labels[:, :-1]], dim=1)
        return moved.masked_fill(moved < 0, self.config.pad_token_id)

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Called by `generate`, before its first step."""
        if generation_config.cache_implementation is not None:
            raise ValueError(
                f"cache_implementation is {generation_config.cache_implementation!r}, expected none: "
                "an SSRU decoder has a cache of its own"
            )
        if model_kwargs.get("past_key_values") is not None:
            _own_cache(model_kwargs["past_key_values"])
        elif generation_config.use_cache is not False:
            rows = max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)
            model_kwargs["past_key_values"] = FirefoxCache(rows)


def source_mask(attention_mask: Tensor, name: str = "attention_mask") -> Tensor | None:
    """A mask (B, S) as attention needs it, shape (B, 1, 1, S), or None if nothing is masked.

    Raises:
        ValueError: Padding does not stand on the right.
    """
    mask = attention_mask.bool()
    if mask.all():
        return None
    if not mask[:, 0].all() or (mask[:, 1:] & ~mask[:, :-1]).any():
        raise ValueError(f"{name} has a row with padding before a token, expected padding on the right only")
    return mask[:, None, None]


def _own_cache(cache: Any) -> FirefoxCache:
    if not isinstance(cache, FirefoxCache):
        raise ValueError(f"past_key_values is a {type(cache).__name__}, expected a FirefoxCache or nothing")
    return cache


def _refuse_attentions(config: Any, wanted: bool | None) -> None:
    if wanted or (wanted is None and config.output_attentions):
        raise ValueError("output_attentions is True, expected False: attention weights are never formed")


def _wanted(config: Any, output_hidden_states: bool | None) -> bool:
    return bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
