"""From Marian's names and options to those of the Hugging Face model."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.backbone.firefox.configuration import FirefoxConfig
from lightning_knnmt.backbone.firefox.marian_file import MarianModel
from lightning_knnmt.backbone.firefox.modeling import UNUSED_BIAS

_EXPECTED: dict[str, Any] = {
    "type": "transformer",
    "transformer-decoder-autoreg": "rnn",
    "dec-cell": "ssru",
    "transformer-ffn-activation": "relu",
    "transformer-ffn-depth": 2,
    "transformer-postprocess": "dan",
}
# What an older Marian may not know of, and what would make another model.
_ABSENT: dict[str, Any] = {
    "transformer-preprocess": "",
    "transformer-postprocess-top": "",
    "transformer-train-position-embeddings": False,
    "transformer-no-projection": False,
    "transformer-no-bias": False,
    "transformer-no-affine": False,
    "transformer-rnn-projection": False,
    "transformer-pool": False,
    "transformer-tied-layers": [],
    "transformer-decoder-dim-ffn": 0,
    "transformer-decoder-ffn-depth": 0,
    "lemma-dim-emb": 0,
    "right-left": False,
    "input-types": [],
    "factors-combine": "sum",
}

_ATTENTION = {
    "q_proj.weight": "Wq", "q_proj.bias": "bq", "k_proj.weight": "Wk", "k_proj.bias": "bk",
    "v_proj.weight": "Wv", "v_proj.bias": "bv", "out_proj.weight": "Wo", "out_proj.bias": "bo",
}  # fmt: skip
_FEED_FORWARD = {
    "fc1.weight": "ffn_W1", "fc1.bias": "ffn_b1", "fc2.weight": "ffn_W2", "fc2.bias": "ffn_b2",
    "final_layer_norm.weight": "ffn_ffn_ln_scale", "final_layer_norm.bias": "ffn_ffn_ln_bias",
}  # fmt: skip
_RNN = {
    "rnn.candidate.weight": "rnn_W", "rnn.forget.weight": "rnn_Wf", "rnn.forget.bias": "rnn_bf",
    "rnn_layer_norm.weight": "rnn_ffn_ln_scale", "rnn_layer_norm.bias": "rnn_ffn_ln_bias",
}  # fmt: skip


def _attention(module: str, marian: str) -> dict[str, str]:
    names = {f"{module}.{ours}": f"{marian}_{theirs}" for ours, theirs in _ATTENTION.items()}
    norm = {"weight": "Wo_ln_scale", "bias": "Wo_ln_bias"}
    return names | {f"{module}_layer_norm.{ours}": f"{marian}_{theirs}" for ours, theirs in norm.items()}


_ENCODER_LAYER = _attention("self_attn", "self") | _FEED_FORWARD
_DECODER_LAYER = _RNN | _attention("encoder_attn", "context") | _FEED_FORWARD


def config_of(model: MarianModel, source: str, **options: Any) -> FirefoxConfig:
    """The configuration of a Marian model.

    Args:
        model: What its file holds.
        source: How errors name it.
        options: Further fields of the configuration.

    Raises:
        ValueError: It is no Transformer with an SSRU decoder as Firefox and Bergamot train them.
    """
    given = model.options
    for name, expected in (_EXPECTED | _ABSENT).items():
        value = given.get(name, _ABSENT.get(name))
        if value != expected:
            raise ValueError(f"{source}: {name} is {value!r}, expected {expected!r}")
    if "n" in str(given.get("transformer-postprocess-emb", "d")):
        raise ValueError(f"{source}: transformer-postprocess-emb has n, expected no norm on embeddings")
    shared = "Wemb" in model.tensors
    sizes = {len(_tensor(model, name, source)) for name in (["Wemb"] if shared else ["encoder_Wemb", "decoder_Wemb"])}
    numbers = {}
    for name in ("dim-emb", "transformer-heads", "transformer-dim-ffn", "enc-depth", "dec-depth"):
        value = given.get(name)
        if not isinstance(value, int) or not 1 <= value <= 65536:
            raise ValueError(f"{source}: {name} is {value!r}, expected a number from 1 to 65536")
        numbers[name] = value
    return FirefoxConfig(
        vocab_size=max(sizes) + 1,
        d_model=numbers["dim-emb"],
        encoder_layers=numbers["enc-depth"],
        decoder_layers=numbers["dec-depth"],
        encoder_attention_heads=numbers["transformer-heads"],
        decoder_attention_heads=numbers["transformer-heads"],
        encoder_ffn_dim=numbers["transformer-dim-ffn"],
        decoder_ffn_dim=numbers["transformer-dim-ffn"],
        share_encoder_decoder_embeddings=shared,
        tie_word_embeddings=_output_weight(model) is None,
        **options,
    )


def state_dict_of(model: MarianModel, config: FirefoxConfig, source: str) -> dict[str, Tensor]:
    """The weights under the names of `FirefoxForConditionalGeneration`.

    Matrices turn from (in, out) to (out, in). Rows that are no tokens, at least that of padding, are zeros with a low
    bias.

    Raises:
        ValueError: A weight is missing, has another shape than the configuration says, or is left over.
    """
    read: set[str] = set()

    def take(name: str, *shape: int) -> NDArray[np.float32]:
        read.add(name)
        values = _tensor(model, name, source)
        flat = values.reshape(-1) if len(shape) == 1 else values
        if flat.shape != shape:
            raise ValueError(f"{source}: {name} has the shape {values.shape}, expected {shape}")
        return flat

    size, rows = config.d_model, config.vocab_size
    state = {}
    for ours, theirs, inside, outside in _layer_names(config):
        values = take(theirs, outside) if ours.endswith("bias") or "norm" in ours else take(theirs, inside, outside).T
        state[ours] = torch.tensor(values)
    sides = ("Wemb", "Wemb") if config.share_encoder_decoder_embeddings else ("encoder_Wemb", "decoder_Wemb")
    for side, name in zip(("encoder", "decoder"), sides, strict=True):
        state[f"model.{side}.embed_tokens.weight"] = _padded(take(name, len(_tensor(model, name, source)), size), rows)
    tokens = len(_tensor(model, sides[1], source))
    output = _output_weight(model)
    if output is None:
        state["lm_head.weight"] = state["model.decoder.embed_tokens.weight"]
    else:
        weight = take(output, tokens, size) if output.endswith("_Wt") else take(output, size, tokens).T
        state["lm_head.weight"] = _padded(weight, rows)
    bias = torch.full((rows,), UNUSED_BIAS)
    bias[:tokens] = torch.tensor(take("decoder_ff_logit_out_b", tokens))
    state["lm_head.bias"] = bias
    if left := sorted(model.tensors.keys() - read):
        raise ValueError(f"{source} has {', '.join(left[:5])}, expected only what such a model needs")
    return state


def _layer_names(config: FirefoxConfig) -> Iterator[tuple[str, str, int, int]]:
    """Our name, Marian's, and the sizes of what goes in and comes out, for each weight of the layers."""
    for side, depth, ffn, names in (
        ("encoder", config.encoder_layers, config.encoder_ffn_dim, _ENCODER_LAYER),
        ("decoder", config.decoder_layers, config.decoder_ffn_dim, _DECODER_LAYER),
    ):
        for number in range(depth):
            for ours, theirs in names.items():
                inside = ffn if ours.startswith("fc2") else config.d_model
                outside = ffn if ours.startswith("fc1") else config.d_model
                yield f"model.{side}.layers.{number}.{ours}", f"{side}_l{number + 1}_{theirs}", inside, outside


def _output_weight(model: MarianModel) -> str | None:
    """The name of an output projection of its own, None if it is the target's embeddings."""
    return next((name for name in ("decoder_ff_logit_out_W", "decoder_ff_logit_out_Wt") if name in model.tensors), None)


def _tensor(model: MarianModel, name: str, source: str) -> NDArray[np.float32]:
    if name not in model.tensors:
        raise ValueError(f"{source} has no {name}, expected a Transformer with an SSRU decoder")
    return model.tensors[name]


def _padded(weight: NDArray[np.float32], rows: int) -> Tensor:
    padded = torch.zeros(rows, weight.shape[1])
    padded[: len(weight)] = torch.tensor(weight)
    return padded
