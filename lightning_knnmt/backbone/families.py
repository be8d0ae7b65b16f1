"""Where each family of Hugging Face translation models keeps the two modules that kNN-MT listens to."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Family:
    """One family of encoder-decoder models.

    Attributes:
        output_projection: The module whose input is the key `decoder_output` and whose output are the logits.
        feed_forward: The module of the last decoder block whose input is the key `ffn_input`.
        final_norm: The module between the last block and the output projection, None in post-norm models.
        time_first: Whether the decoder's blocks see (T, B, D) instead of (B, T, D).
        explicit_shift: Whether the model must be given its decoder input, because it would not derive it from labels.
    """

    output_projection: Callable[[PreTrainedModel], nn.Module]
    feed_forward: Callable[[PreTrainedModel], nn.Module]
    final_norm: Callable[[PreTrainedModel], nn.Module | None]
    time_first: bool = False
    explicit_shift: bool = False


FAMILIES: dict[str, Family] = {
    "marian": Family(
        output_projection=lambda model: model.lm_head,
        feed_forward=lambda model: model.model.decoder.layers[-1].fc1,
        final_norm=lambda model: None,
    ),
    "m2m_100": Family(
        output_projection=lambda model: model.lm_head,
        feed_forward=lambda model: model.model.decoder.layers[-1].fc1,
        final_norm=lambda model: model.model.decoder.layer_norm,
    ),
    "mbart": Family(
        output_projection=lambda model: model.lm_head,
        feed_forward=lambda model: model.model.decoder.layers[-1].fc1,
        final_norm=lambda model: model.model.decoder.layer_norm,
    ),
    "t5": Family(
        output_projection=lambda model: model.lm_head,
        feed_forward=lambda model: model.decoder.block[-1].layer[-1].DenseReluDense,
        final_norm=lambda model: model.decoder.final_layer_norm,
    ),
    "fsmt": Family(
        output_projection=lambda model: model.model.decoder.output_projection,
        feed_forward=lambda model: model.model.decoder.layers[-1].fc1,
        final_norm=lambda model: None,
        time_first=True,
        explicit_shift=True,
    ),
}


def family_of(model: PreTrainedModel) -> Family:
    """The family of a model.

    Raises:
        ValueError: The model's type is not supported.
    """
    model_type = model.config.model_type
    if model_type not in FAMILIES:
        raise ValueError(
            f"model {model.name_or_path!r} is of type {model_type!r}, expected one of {', '.join(sorted(FAMILIES))}; "
            "add a Family to lightning_knnmt/backbone/families.py"
        )
    return FAMILIES[model_type]


def logits_bias(model: PreTrainedModel) -> Tensor | None:
    """The constant that Marian and mBART add to their logits after the projection, shape (1, V), or None."""
    return getattr(model, "final_logits_bias", None)
