"""Sizes and special tokens of a Firefox Translations model."""

from typing import Any

from transformers import PretrainedConfig


class FirefoxConfig(PretrainedConfig):
    """Configuration of a student of the Firefox Translations and Bergamot projects: Transformer encoder, SSRU decoder.

    Attributes:
        vocab_size: Rows V of the embeddings, with one for padding after Marian's own; the larger of two vocabularies.
        d_model: Size D of the states.
        encoder_layers: Encoder blocks.
        decoder_layers: Decoder blocks.
        encoder_attention_heads: Heads of the encoder's self-attention.
        decoder_attention_heads: Heads of the decoder's attention to the source.
        encoder_ffn_dim: Size of the encoder's feed-forward layers.
        decoder_ffn_dim: Size of the decoder's feed-forward layers.
        max_position_embeddings: Longest sequence, in tokens. Positions are computed, so that this is advice.
        dropout: Dropout rate behind embeddings and sub-layers while training.
        layer_norm_eps: Added to the variance in norms.
        init_std: Standard deviation of new weights.
        share_encoder_decoder_embeddings: Whether source and target have one vocabulary and one matrix.
        sentence_languages: Languages by whose rules texts are cut into sentences, such as `en-pt`; None: they are not.
        pad_token_id: The last row, which embeds as zeros; decoding begins with it.
    """

    model_type = "firefox"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012, Hugging Face's own attribute
    attribute_map = {  # noqa: RUF012
        "num_attention_heads": "encoder_attention_heads",
        "hidden_size": "d_model",
        "num_hidden_layers": "encoder_layers",
    }

    vocab_size: int = 32001
    d_model: int = 256
    encoder_layers: int = 6
    decoder_layers: int = 2
    encoder_attention_heads: int = 8
    decoder_attention_heads: int = 8
    encoder_ffn_dim: int = 1536
    decoder_ffn_dim: int = 1536
    max_position_embeddings: int = 512
    dropout: float = 0.0
    layer_norm_eps: float = 1e-9
    init_std: float = 0.02
    share_encoder_decoder_embeddings: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True
    sentence_languages: str | None = None
    pad_token_id: int | None = None
    decoder_start_token_id: int | None = None
    eos_token_id: int | None = 0
    unk_token_id: int = 1

    def __post_init__(self, **options: Any) -> None:
        if self.d_model < 4 or self.d_model % 2:
            raise ValueError(f"d_model is {self.d_model}, expected an even number of 4 or more")
        for name in ("encoder_attention_heads", "decoder_attention_heads"):
            if self.d_model % getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a divisor of d_model, {self.d_model}")
        if self.pad_token_id is None:
            self.pad_token_id = self.vocab_size - 1
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.pad_token_id
        super().__post_init__(**options)
