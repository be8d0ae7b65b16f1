"""What differs between the families of Hugging Face translation and language models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel

from lightning_knnmt.backbone import firefox  # noqa: F401, makes the family known to Hugging Face's Auto classes
from lightning_knnmt.backbone.cached_decoder import CachedDecoder
from lightning_knnmt.backbone.firefox.row_decoder import FirefoxRows
from lightning_knnmt.backbone.gguf import is_gguf
from lightning_knnmt.backbone.hub import read_config
from lightning_knnmt.backbone.row_decoder import RowDecoder
from lightning_knnmt.backbone.tokenization import FSMTTokenizer
from lightning_knnmt.data.sentences import SentenceSplitter

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.backbone.seq2seq import Seq2SeqModel


@dataclass(frozen=True)
class Family:
    """One family of encoder-decoder or decoder-only models.

    Attributes:
        output_projection: The module whose input is the key `decoder_output` and whose output are the logits.
        feed_forward: The module of the last decoder block whose input is the key `ffn_input`.
        residual: The module of that block whose input is the key `ffn_residual`: everything behind it is trained.
        outputs: What the model makes of such states: (model, (..., D)) -> decoder outputs (..., D).
        last_block: The last decoder block.
        feed_forward_layers: The linear layers of its feed-forward part.
        final_norm: The norm that makes the decoder's outputs: behind the last block in pre-norm models, that block's
            own last one in post-norm models.
        time_first: Whether the decoder's blocks see (T, B, D) instead of (B, T, D).
        tokenizer: The class whose `from_pretrained` loads the family's tokenizers.
        decoder: Makes what decodes a token at a time, with a number of rows for each sentence.
    """

    output_projection: Callable[[Any], nn.Module]
    feed_forward: Callable[[Any], nn.Module]
    residual: Callable[[Any], nn.Module]
    outputs: Callable[[Any, Tensor], Tensor]
    last_block: Callable[[Any], nn.Module]
    feed_forward_layers: Callable[[Any], list[nn.Module]]
    final_norm: Callable[[Any], nn.Module]
    time_first: bool = False
    tokenizer: Any = AutoTokenizer
    decoder: Callable[["Seq2SeqModel", int], RowDecoder] = CachedDecoder


def _last_block(model: Any) -> Any:
    return model.model.decoder.layers[-1]


def _last_blocks_norm(model: Any) -> Any:
    return _last_block(model).final_layer_norm


def _norm_behind_blocks(model: Any) -> Any:
    return model.model.decoder.layer_norm


def _like_bart(
    pre_norm: bool,
    output_projection: Callable[[Any], nn.Module] = lambda model: model.lm_head,
    time_first: bool = False,
    tokenizer: Any = AutoTokenizer,
    decoder: Callable[["Seq2SeqModel", int], RowDecoder] = CachedDecoder,
) -> Family:
    """A family whose decoder blocks are those of BART, with the feed-forward layers `fc1` and `fc2`.

    Args:
        pre_norm: Whether norms stand before the sub-layers, and one behind all blocks, or behind each sub-layer.
        output_projection: As in `Family`, as are the others.
        time_first: As in `Family`.
        tokenizer: As in `Family`.
    """
    final_norm = _norm_behind_blocks if pre_norm else _last_blocks_norm

    def outputs(model: Any, states: Tensor) -> Tensor:
        block = _last_block(model)
        hidden = block.final_layer_norm(states) if pre_norm else states
        hidden = getattr(block, "activation_fn", functional.relu)(block.fc1(hidden))
        hidden = functional.dropout(hidden, getattr(block, "activation_dropout", 0.0), block.training)
        hidden = states + functional.dropout(block.fc2(hidden), block.dropout, block.training)
        return cast(Tensor, final_norm(model)(hidden))

    return Family(
        output_projection=output_projection,
        feed_forward=lambda model: _last_block(model).fc1,
        residual=lambda model: _last_block(model).final_layer_norm if pre_norm else _last_block(model).fc1,
        outputs=outputs,
        last_block=_last_block,
        feed_forward_layers=lambda model: [_last_block(model).fc1, _last_block(model).fc2],
        final_norm=final_norm,
        time_first=time_first,
        tokenizer=tokenizer,
        decoder=decoder,
    )


def _t5_outputs(model: Any, states: Tensor) -> Tensor:
    decoder = model.decoder
    hidden = decoder.dropout(decoder.final_layer_norm(decoder.block[-1].layer[-1](states)))
    tied_umt5 = model.config.model_type == "umt5" and model.config.tie_word_embeddings
    scaled = getattr(model.config, "scale_decoder_outputs", tied_umt5)  # as each of the three does
    return cast(Tensor, hidden * model.model_dim**-0.5 if scaled else hidden)


_LIKE_T5 = Family(
    output_projection=lambda model: model.lm_head,
    feed_forward=lambda model: model.decoder.block[-1].layer[-1].DenseReluDense,
    residual=lambda model: model.decoder.block[-1].layer[-1],
    outputs=_t5_outputs,
    last_block=lambda model: model.decoder.block[-1],
    feed_forward_layers=lambda model: [
        module for module in model.decoder.block[-1].layer[-1].modules() if isinstance(module, nn.Linear)
    ],
    final_norm=lambda model: model.decoder.final_layer_norm,
)


def _gpt2_outputs(model: Any, states: Tensor) -> Tensor:
    block = model.transformer.h[-1]
    return cast(Tensor, model.transformer.ln_f(states + block.mlp(block.ln_2(states))))


def _llama_outputs(model: Any, states: Tensor) -> Tensor:
    block = model.model.layers[-1]
    return cast(Tensor, model.model.norm(states + block.mlp(block.post_attention_layernorm(states))))


_LIKE_GPT2 = Family(
    output_projection=lambda model: model.lm_head,
    feed_forward=lambda model: model.transformer.h[-1].mlp,
    residual=lambda model: model.transformer.h[-1].ln_2,
    outputs=_gpt2_outputs,
    last_block=lambda model: model.transformer.h[-1],
    feed_forward_layers=lambda model: [model.transformer.h[-1].mlp.c_fc, model.transformer.h[-1].mlp.c_proj],
    final_norm=lambda model: model.transformer.ln_f,
)

_LIKE_LLAMA = Family(
    output_projection=lambda model: model.lm_head,
    feed_forward=lambda model: model.model.layers[-1].mlp,
    residual=lambda model: model.model.layers[-1].post_attention_layernorm,
    outputs=_llama_outputs,
    last_block=lambda model: model.model.layers[-1],
    feed_forward_layers=lambda model: [
        module for module in model.model.layers[-1].mlp.modules() if isinstance(module, nn.Linear)
    ],
    final_norm=lambda model: model.model.norm,
)

FAMILIES: dict[str, Family] = {
    "bart": _like_bart(pre_norm=False),
    "firefox": _like_bart(pre_norm=False, decoder=FirefoxRows),
    "marian": _like_bart(pre_norm=False),
    "m2m_100": _like_bart(pre_norm=True),
    "mbart": _like_bart(pre_norm=True),  # and mBART-50
    "pegasus": _like_bart(pre_norm=True),
    "t5": _LIKE_T5,
    "mt5": _LIKE_T5,
    "umt5": _LIKE_T5,
    "fsmt": _like_bart(
        pre_norm=False,
        output_projection=lambda model: model.model.decoder.output_projection,
        time_first=True,
        tokenizer=FSMTTokenizer,
    ),
    "gpt2": _LIKE_GPT2,
    "llama": _LIKE_LLAMA,
    "mistral": _LIKE_LLAMA,
    "qwen2": _LIKE_LLAMA,
    "qwen3": _LIKE_LLAMA,
    "smollm3": _LIKE_LLAMA,
}


def model_class_of(model: str) -> "type[KeyedModel]":
    """The class that loads a model.

    Raises:
        OSError: There is no such folder, and the hub has no such model or cannot be reached.
        ValueError: The model brings code of its own, which is never run.
    """
    from lightning_knnmt.backbone.causal import CausalModel
    from lightning_knnmt.backbone.seq2seq import Seq2SeqModel

    if is_gguf(model):
        return CausalModel
    return Seq2SeqModel if read_config(model).is_encoder_decoder else CausalModel


def family_of(config: PretrainedConfig, name: str) -> Family:
    """The family of the model `name`, told by its configuration.

    Raises:
        ValueError: The model's type is not supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model {name!r} is of type {config.model_type!r}, expected one of {', '.join(sorted(FAMILIES))}; "
            "add a Family to lightning_knnmt/backbone/families.py"
        )
    return FAMILIES[config.model_type]


def splitter_of(config: PretrainedConfig, sentences: str) -> SentenceSplitter | None:
    """What cuts texts into sentences for a model; None: nothing does.

    Args:
        config: The model's, whose `sentence_languages` say what its family is used to.
        sentences: As in `BackboneConfig`.

    Raises:
        ValueError: These are no languages.
    """
    languages = getattr(config, "sentence_languages", None) if sentences == "auto" else sentences
    return None if languages in (None, "none") else SentenceSplitter(languages)


def logits_bias(model: PreTrainedModel) -> Tensor | None:
    """The constant that Marian and mBART add to their logits after the projection, shape (1, V), or None."""
    return getattr(model, "final_logits_bias", None)


def position_limit(config: PretrainedConfig) -> int | None:
    """The longest sequence in tokens; None for T5, whose positions are relative."""
    return getattr(config, "max_position_embeddings", None)
