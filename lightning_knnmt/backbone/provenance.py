"""What decides which keys and values a corpus gets."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from lightning_knnmt.checks import check_types

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel

MOST_DIMENSIONS = 1 << 20


@dataclass(frozen=True)
class Provenance:
    """What decides which keys and values a corpus gets.

    Attributes:
        model: Name or folder of the model.
        model_sha256: Fingerprint of its weights.
        tokenizer_sha256: Fingerprint of its tokenizer.
        key_type: Where the keys were read.
        key_size: D.
        src_lang: Language code of the source, if the model needs one.
        tgt_lang: Language code of the target, if the model needs one.
        src_prefix: What was put before every source.
        sentences: Languages by whose rules texts were cut into sentences; empty if they were not.
    """

    model: str
    model_sha256: str
    tokenizer_sha256: str
    key_type: str
    key_size: int
    src_lang: str | None
    tgt_lang: str | None
    src_prefix: str = ""
    sentences: str = ""

    def __post_init__(self) -> None:
        check_types(self)
        if not 1 <= self.key_size <= MOST_DIMENSIONS:
            raise ValueError(f"key_size is {self.key_size}, expected 1 to {MOST_DIMENSIONS}")

    @property
    def key_dtype(self) -> str:
        """Type of the stored keys."""
        return key_dtype(self.key_type)

    @classmethod
    def of(cls, model: "KeyedModel") -> "Provenance":
        """What keys made by this model come from."""
        return cls(
            model=model.name,
            model_sha256=model.model_fingerprint,
            tokenizer_sha256=model.tokenizer_fingerprint,
            key_type=model.config.key_type,
            key_size=model.key_size,
            src_lang=model.config.src_lang,
            tgt_lang=model.config.tgt_lang,
            src_prefix=model.config.src_prefix,
            sentences=model.sentences,
        )

    def differences(self, other: "Provenance") -> list[str]:
        """In words, what makes the keys of two provenances incomparable; the model's name alone does not."""
        found = []
        if self.model_sha256 != other.model_sha256:
            found.append(f"model {_model(self)} against {_model(other)}")
        for name in ("tokenizer_sha256", "key_type", "key_size", "src_lang", "tgt_lang", "src_prefix", "sentences"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                label = name.removesuffix("_sha256")
                found.append(f"{label} {str(ours)[:16]} against {str(theirs)[:16]}")
        return found


def key_dtype(key_type: str) -> str:
    """Type of stored keys: float16, but states that a model is trained on are not rounded."""
    return "float32" if key_type == "ffn_residual" else "float16"


def _model(provenance: Provenance) -> str:
    return f"{provenance.model} ({provenance.model_sha256[:12]})"
