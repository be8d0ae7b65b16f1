"""Fine-tuning the way to the logits: untied output projections, adapters, and how both are saved."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lightning_knnmt.backbone.families import Family


def freeze_below_output(model: PreTrainedModel, family: Family, adapter_rank: int | None) -> None:
    """Leave only the way from the last decoder block to the logits trainable; see `PretrainedModel`."""
    projection: Any = family.output_projection(model)
    untie(model, projection)
    model.requires_grad_(False)
    family.final_norm(model).requires_grad_(True)
    layers = [*family.feed_forward_layers(model), projection]
    if adapter_rank is None:
        for layer in layers:
            layer.requires_grad_(True)
    else:
        add_adapters(model, layers, adapter_rank)


def frozen_fingerprint(model: PreTrainedModel, family: Family) -> str:
    """SHA-256 of a model without the part that `freeze_below_output` leaves trainable.

    It is the same for a model and for all that were fine-tuned from it, before, during and after training.
    """
    trained = [*family.feed_forward_layers(model), family.final_norm(model), family.output_projection(model)]
    names = tuple(f"{name}." for name, module in model.named_modules() if any(module is each for each in trained))
    digest = hashlib.sha256(str(model.config.model_type).encode())
    for name, weights in sorted(model.state_dict().items()):
        if not name.startswith(names):
            digest.update(f"{name} {weights.dtype} {tuple(weights.shape)}".encode())
            digest.update(weights.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def untie(model: PreTrainedModel, projection: Any) -> None:
    """Give the output projection weights of its own, which stay its own when the model is saved and loaded again.

    The configurations of T5, mT5 and umT5 cannot say so: Hugging Face unties their projection when it finds other
    weights than the embedding's in the file.
    """
    projection.weight = nn.Parameter(projection.weight.detach().clone())
    if model.config.model_type not in ("t5", "mt5", "umt5"):
        model.config.tie_word_embeddings = False


def add_adapters(model: PreTrainedModel, layers: Sequence[nn.Module], rank: int) -> None:
    """Put a trainable low-rank adapter beside each of the linear layers (LoRA, arXiv 2106.09685).

    Raises:
        ImportError: PEFT is not installed.
        ValueError: The rank is more than the layers have.
    """
    most = min(min(parameter.shape) for layer in layers for parameter in layer.parameters() if parameter.ndim == 2)
    if rank > most:
        raise ValueError(f"adapter_rank is {rank}, expected at most {most}, the rank of the smallest layer")
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ImportError("adapters need PEFT; install it with `pip install peft`") from error
    names = [name for name, module in model.named_modules() if any(module is layer for layer in layers)]
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names), model)
    for parameter in trainable:  # PEFT freezes everything else
        parameter.requires_grad_(True)


def saved_state(model: PreTrainedModel) -> dict[str, Tensor]:
    """The weights under the names that Hugging Face loads: adapters merged, and one copy for each name.

    A model whose configuration says that nothing is tied is loaded without tying the encoder's and the decoder's
    embeddings either, so that each needs its weights in the file.
    """
    state = dict(model.state_dict())
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            inside = [key for key in state if key.startswith(f"{name}.")]
            parts = {key.removeprefix(f"{name}."): state.pop(key) for key in inside}
            state[f"{name}.weight"] = parts["base_layer.weight"] + module.get_delta_weight("default")
            if "base_layer.bias" in parts:
                state[f"{name}.bias"] = parts["base_layer.bias"]
    if not model.config.tie_word_embeddings:
        storages = set()
        for name, weights in state.items():
            if weights.data_ptr() in storages:
                state[name] = weights.clone()
            storages.add(weights.data_ptr())
    return state
