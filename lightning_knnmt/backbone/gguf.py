"""Models in one .gguf file, as llama.cpp runs them; transformers turns their weights into the ordinary ones."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GgufConfig, PretrainedConfig, PreTrainedModel

SUFFIX = ".gguf"


def is_gguf(model: str) -> bool:
    """Whether a model is named by a .gguf file."""
    return model.endswith(SUFFIX)


def loading_options(model: str) -> dict[str, Any]:
    """What `from_pretrained` has to be told to load a hub name, a folder or a .gguf file.

    Raises:
        FileNotFoundError: There is no such .gguf file.
        ImportError: The package that reads .gguf files is not installed.
    """
    if not is_gguf(model):
        return {"pretrained_model_name_or_path": model}
    path = Path(model)
    if not path.is_file():
        raise FileNotFoundError(f"model is {model!r}, which is no file here, expected a .gguf file")
    if find_spec("gguf") is None:
        raise ImportError(f"model is {model!r}; reading .gguf files needs `pip install gguf`")
    return {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}


def load_causal(model: str, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The weights of a language model, those of a .gguf file unpacked: an ordinary model, to be trained and saved."""
    # without being told, transformers leaves them packed where it finds a package with kernels for that
    packed = {"quantization_config": GgufConfig(dequantize=True)} if is_gguf(model) else {}
    options: dict[str, Any] = {**loading_options(model), **packed, "config": config, "dtype": dtype}
    return AutoModelForCausalLM.from_pretrained(**options, trust_remote_code=False)
