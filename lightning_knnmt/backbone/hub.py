"""What a folder or the hub is read for: settings and weights, never code."""

import pickle
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, PretrainedConfig
from transformers.models.auto.tokenization_auto import get_tokenizer_config


def read_config(model: str) -> PretrainedConfig:
    """The configuration of a model that needs no code of its own.

    Args:
        model: Hub name or folder.

    Raises:
        OSError: There is no such folder, and the hub has no such model or cannot be reached.
        ValueError: The model brings code of its own, which is never run.
    """
    try:
        found, _ = PretrainedConfig.get_config_dict(model)
    except OSError as error:
        raise OSError(
            f"model {model!r} is no folder with a config.json here, and the hub gave none of that name: {error}"
        ) from error
    for file, content in (("config.json", found), ("tokenizer_config.json", get_tokenizer_config(model))):
        if "auto_map" in content:
            raise ValueError(
                f"model {model!r} has an auto_map in its {file}, which asks for code of its own; expected none, since "
                "no model's code is run: remove the auto_map if transformers knows the model's type, or write a "
                "KeyedModel and name it in model_class"
            )
    return AutoConfig.from_pretrained(model, trust_remote_code=False)


def read_weights(auto: Any, model: str, dtype: str) -> Any:
    """A model with its weights.

    Args:
        auto: One of Hugging Face's Auto classes for models.
        model: Hub name or folder.
        dtype: Type of the weights.

    Raises:
        ValueError: The weights are damaged, or a pickle that holds other things than weights.
    """
    try:
        return auto.from_pretrained(model, dtype=getattr(torch, dtype), trust_remote_code=False)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError) as error:
        raise ValueError(f"the weights of model {model!r} cannot be read ({_first_line(error)})") from error


def device_of(name: str) -> torch.device:
    """The device of an option; `auto`: the GPU if there is one.

    Raises:
        ValueError: There is no such device here.
    """
    try:
        device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device is {name!r}, expected one that is here: auto, cpu, or such as cuda or cuda:1 where there are GPUs "
            f"({_first_line(error)})"
        ) from error
    return device


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
