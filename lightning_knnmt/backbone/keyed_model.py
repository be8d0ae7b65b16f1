"""What the rest of the package needs of a model: keys, logits, tokens, and a place to mix in neighbors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.firefox.shortlist import Shortlist
from lightning_knnmt.backbone.row_decoder import RowDecoder
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.sentences import Sentence, SentenceSplitter


@dataclass(frozen=True)
class TokenIds:
    """Tokenized texts.

    Attributes:
        src: Token ids of each source, special tokens included.
        tgt: Token ids of each target; empty if none were given.
        cut: How many texts were longer than the model's positions and were cut.
    """

    src: list[list[int]]
    tgt: list[list[int]]
    cut: int


class KeyedModel(nn.Module, ABC):
    """A model whose decoder states serve as keys.

    Shapes: B sentences, T target tokens, R rows (sentences × beams), D key size, V vocabulary.

    Args:
        config: How it was asked for.

    Attributes:
        config: The same.
        tokenizer: Its Hugging Face tokenizer.
        position_limit: The longest sequence in tokens; None: any.
        splitter: Cuts texts into sentences; None: texts are taken whole.
        forced_id: The first token of every translation, where it is forced and not predicted.
    """

    tokenizer: Any
    position_limit: int | None
    forced_id: int | None = None
    splitter: SentenceSplitter | None = None

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config

    @property
    def name(self) -> str:
        """Hub name or folder."""
        return self.config.model

    @property
    def pad_id(self) -> int:
        """The padding token's id."""
        return int(self.tokenizer.pad_token_id)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    @abstractmethod
    def dtype(self) -> str:
        """Type of the weights, such as `float32`."""

    @property
    @abstractmethod
    def key_size(self) -> int:
        """D, the number of a key's dimensions."""

    @property
    @abstractmethod
    def vocabulary_size(self) -> int:
        """V, the number of logits."""

    @property
    @abstractmethod
    def model_fingerprint(self) -> str:
        """SHA-256 of the weights and of what else decides the keys."""

    @property
    @abstractmethod
    def tokenizer_fingerprint(self) -> str:
        """SHA-256 of the vocabulary and normalisation."""

    @property
    def sentences(self) -> str:
        """Languages by whose rules texts are cut into sentences; empty if they are not."""
        return "" if self.splitter is None else self.splitter.languages

    def split(self, text: str) -> list[Sentence]:
        """The sentences of a source text that are translated one by one."""
        return [Sentence(text)] if self.splitter is None else self.splitter.split(text)

    def split_pairs(self, pairs: Iterable[Pair]) -> Iterable[Pair]:
        """The sentence pairs that are stored, and teacher-forced, one by one."""
        return pairs if self.splitter is None else self.splitter.pairs(pairs)

    @abstractmethod
    def tokenize(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> TokenIds:
        """Token ids of sources and, where given, of targets; what is too long is cut and counted."""

    @abstractmethod
    def batch(self, sources: Sequence[str], targets: Sequence[str] | None = None) -> Batch:
        """Tokenize and pad B sentences, on the model's device."""

    def encoder_states(self, batch: Batch) -> Tensor:
        """States of the source tokens, shape (B, S, width of the encoder)."""
        raise NotImplementedError(f"{type(self).__name__} has no encoder")

    def check_encoder(self) -> None:
        """Refuse a model that has no `encoder_states`.

        Raises:
            ValueError: It has none.
        """
        if type(self).encoder_states is KeyedModel.encoder_states:
            raise ValueError(f"{self.name} has no encoder, expected a translation model that has")

    @abstractmethod
    def keys(self, batch: Batch) -> Tensor:
        """Keys of a teacher-forced pass, shape (B, T, D): position t holds the state that predicts label t."""

    @abstractmethod
    def keys_and_logits(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys and logits of one teacher-forced pass, shapes (B, T, D) and (B, T, V)."""

    @abstractmethod
    def project(self, states: Tensor) -> Tensor:
        """Logits of decoder outputs: (..., D) -> (..., V)."""

    @abstractmethod
    def generate(self, batch: Batch, **options: Any) -> Tensor:
        """Decode a batch with options of Hugging Face's `generate`, shape (sequences, T)."""

    def search_rules(self) -> tuple[Any, dict[str, Any]] | None:
        """The Hugging Face model whose generation configuration rules decoding, and options that override it.

        Returns:
            None if the model cannot be decoded `stepwise`, and leaves all to `generate`.
        """
        return None

    def stepwise(self, beams: int) -> RowDecoder:
        """Decoding one step at a time.

        Args:
            beams: Rows of each sentence, which lie together.
        """
        raise NotImplementedError(f"{type(self).__name__} is decoded by generate")

    def projection_weights(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight (V, D) and bias (V,) with which `project` is F.linear; None: it is something else."""
        return None

    def shortlist(self) -> Shortlist | None:
        """The model's own table of likely target tokens; None: it has none."""
        return None

    @property
    def shares_vocabulary(self) -> bool:
        """Whether a source token may be copied, since the target has the same vocabulary."""
        return True

    @abstractmethod
    def mixing(self, mix: Callable[[Tensor, Tensor, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Let a function change the logits of every forward pass within the block.

        Args:
            mix: Takes queries (R, D) and logits (R, V) of the last position, which it may overwrite, and the tokens
                that the pass reads, shape (R, T), at least the latest; gives logits (R, V).
        """

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write the model and its tokenizer as a Hugging Face folder."""
