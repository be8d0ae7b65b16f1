"""Vectors of sentences: averaged states of a translation model's encoder, or of any encoder of Hugging Face."""

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.batching import token_budget_batches

BATCH_TOKENS = 4096  # most tokens of a batch, padding counted
MOST_TOKENS = 512  # of a sentence, where an encoder does not say


class SentenceEncoder(Protocol):
    """Turns texts into vectors of length 1."""

    name: str
    fingerprint: str

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors of N texts, shape (N, E), float32, on the CPU."""
        ...


def mean_pooled(states: Tensor, mask: Tensor) -> Tensor:
    """Mean of the states of each sentence's tokens, scaled to length 1.

    Args:
        states: Shape (B, S, E).
        mask: 1 for tokens, 0 for padding, shape (B, S).

    Returns:
        Shape (B, E), float32.

    >>> mean_pooled(torch.tensor([[[3.0, 0.0], [3.0, 8.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]]))
    tensor([[0.6000, 0.8000]])
    """
    weights = mask.unsqueeze(2).float()
    return F.normalize((states.float() * weights).sum(1) / weights.sum(1).clamp(min=1), dim=1)


class StatesEncoder:
    """The translation model's own encoder: the mean of its states, without any further model.

    Args:
        model: One with an encoder.

    Raises:
        ValueError: It has none.
    """

    def __init__(self, model: KeyedModel) -> None:
        model.check_encoder()
        self.model, self.name, self.fingerprint = model, model.name, model.model_fingerprint

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors of N texts, shape (N, D), float32, on the CPU."""
        rows = self.model.tokenize(texts).src if texts else []

        def encoded(places: list[int]) -> Tensor:
            batch = collate([rows[place] for place in places], None, self.model.pad_id).to(self.model.device)
            return mean_pooled(self.model.encoder_states(batch), batch.attention_mask)

        return _in_batches(list(map(len, rows)), encoded)


class TransformersEncoder:
    """An encoder of Hugging Face, such as those of sentence-transformers, with mean pooling.

    Args:
        name: Hub name or folder.

    Raises:
        OSError: There is no such folder, and the hub has no such model or cannot be reached.
        ValueError: It brings code of its own, which is never run.
    """

    def __init__(self, name: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        from lightning_knnmt.backbone.fingerprint import model_fingerprint, tokenizer_fingerprint
        from lightning_knnmt.backbone.hub import read_config, read_weights

        config: Any = read_config(name)
        self.name = name
        self._tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = read_weights(AutoModel, name, "float32").eval()
        self._model = model.get_encoder() if config.is_encoder_decoder else model
        parts = model_fingerprint(name), tokenizer_fingerprint(self._tokenizer)
        self.fingerprint = hashlib.sha256("".join(parts).encode()).hexdigest()
        positions = getattr(config, "max_position_embeddings", None) or MOST_TOKENS
        self._most = min(positions, self._tokenizer.model_max_length)

    @torch.inference_mode()
    def encode(self, texts: Sequence[str]) -> Tensor:
        """Vectors of N texts, shape (N, E), float32, on the CPU; what is longer than its positions is cut."""
        rows = self._tokenizer(list(texts), truncation=True, max_length=self._most).input_ids if texts else []

        def encoded(places: list[int]) -> Tensor:
            batch = self._tokenizer.pad({"input_ids": [rows[place] for place in places]}, return_tensors="pt")
            return mean_pooled(self._model(**batch)[0], batch["attention_mask"])

        return _in_batches(list(map(len, rows)), encoded)


def _in_batches(lengths: list[int], encoded: Any) -> Tensor:
    """Vectors in the order of the texts, encoded in batches of similar lengths."""
    if not lengths:
        return torch.empty(0, 1)
    batches = list(token_budget_batches(lengths, BATCH_TOKENS))
    vectors = torch.cat([encoded(places).cpu() for places in batches])
    return vectors[torch.tensor([place for places in batches for place in places]).argsort()]
