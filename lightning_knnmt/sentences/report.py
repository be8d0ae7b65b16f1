"""What a sentence index is: the sealed description beside its file, without which it does not count."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lightning_knnmt.checks import check_one_of, check_types
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_problem
from lightning_knnmt.storage.sealed import read_sealed

Likeness = Literal["bm25", "tf_idf", "states", "encoder"]
LIKENESSES: tuple[Likeness, ...] = ("bm25", "tf_idf", "states", "encoder")
REMEDY = "make it again with `build_index.py sentences`"


@dataclass(frozen=True)
class SentencesReport:
    """What a sentence index is.

    Attributes:
        by: `bm25` or `tf_idf`: words; `states`: averaged encoder states of the translation model; `encoder`: another
            encoder.
        sentences: How many it holds, those that were removed since counted.
        datastore_sha256: Fingerprint of the datastore's manifest.
        file_sha256: Checksum of NAME.sentences.safetensors.
        encoder: Hub name or folder of the encoder; None for words.
        encoder_sha256: Its fingerprint.
    """

    by: str
    sentences: int
    datastore_sha256: str
    file_sha256: str
    encoder: str | None = None
    encoder_sha256: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        check_one_of(LIKENESSES, by=self.by)
        if (self.encoder is None or self.encoder_sha256 is None) != (self.by in ("bm25", "tf_idf")):
            raise ValueError(f"by is {self.by!r} and encoder {self.encoder!r}, expected an encoder for vectors only")

    @classmethod
    def load(cls, path: Path) -> "SentencesReport":
        """Read the description of a sentence index.

        Args:
            path: NAME.sentences.safetensors.

        Raises:
            DatastoreError: It is missing or damaged.
        """
        description = path.with_suffix(".json")
        if not description.exists():
            raise DatastoreError(f"{description} is missing; {REMEDY}")
        try:
            return cls(**read_sealed(description))
        except (ValueError, TypeError) as error:
            raise DatastoreError(f"{description} is damaged ({error}); {REMEDY}") from error

    def problem(self, path: Path) -> str | None:
        """What is wrong with the file, in words that follow its name."""
        return file_problem(path, self.file_sha256, REMEDY)
