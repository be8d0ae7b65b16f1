"""Fingerprints of weights and tokenizers, so that keys of different models are never mixed."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers.utils import cached_file

_PROBE = "Straße, naïve Œuvre — 3.14 % of “Ünïcödé”\tİstanbul ﬁn 你好"


def model_fingerprint(model: str) -> str:
    """SHA-256 over the weight files of a model, whether a folder or a hub name that has been loaded before.

    Raises:
        FileNotFoundError: There are no weight files.
    """
    folder = Path(str(cached_file(model, "config.json"))).parent
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    if not files:
        raise FileNotFoundError(f"{folder} has neither *.safetensors nor pytorch_model*.bin files to fingerprint")
    digest = hashlib.sha256()
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
