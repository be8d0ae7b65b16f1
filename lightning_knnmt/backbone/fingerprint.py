"""Fingerprints of weights and tokenizers, so that keys of different models are never mixed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

from lightning_knnmt.backbone.gguf import is_gguf

_PROBE = "Straße, naïve Œuvre — 3.14 % of “Ünïcödé”\tİstanbul ﬁn 你好"


# What config.json says about a model's history and its use, not about its function.
_NOT_FUNCTION = {"_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache"}


def model_fingerprint(model: str) -> str:
    """SHA-256 over the weights and the configuration of a model: a folder, a .gguf file, or a hub name loaded before.

    Raises:
        FileNotFoundError: There are no weight files.
    """
    if is_gguf(model):  # which holds both
        with Path(model).open("rb") as whole:
            return hashlib.file_digest(whole, "sha256").hexdigest()
    folder = Path(str(cached_file(model, "config.json"))).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} has neither *.safetensors nor pytorch_model*.bin files to fingerprint")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    function = {name: value for name, value in config.items() if name not in _NOT_FUNCTION}
    digest = hashlib.sha256(json.dumps(function, sort_keys=True).encode())
    for file in files:
        with file.open("rb") as content:
            while piece := content.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's vocabulary and what it makes of a sentence that shows its normalisation."""
    content = [sorted(tokenizer.get_vocab().items())]
    if isinstance(decoder := getattr(tokenizer, "decoder", None), dict):  # targets may have a vocabulary of their own
        content.append(sorted(decoder.items()))
    content += [tokenizer(_PROBE).input_ids, tokenizer(text_target=_PROBE).input_ids]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
