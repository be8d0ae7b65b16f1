"""A binary file with a sealed description beside it, without which it does not count."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.sealed import read_sealed, write_sealed

CHECKSUM = "faiss_sha256"  # of the binary file, in its description


class Artifact:
    """NAME.faiss and NAME.json: first the binary file is written, then the description that makes it count.

    Args:
        path: Of the binary file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.description = path.with_suffix(".json")

    def write(self, write: Callable[[Path], str]) -> str:
        """Write the binary file, which does not count until it is described.

        Args:
            write: Writes it, whole or not at all, and gives its SHA-256.

        Returns:
            That checksum.
        """
        self.description.unlink(missing_ok=True)
        return write(self.path)

    def describe(self, content: Mapping[str, Any], sha256: str) -> None:
        """Write the description.

        Args:
            content: Of the description.
            sha256: Checksum of the binary file.

        Raises:
            DatastoreError: It could not be written.
        """
        write_sealed(self.description, {**content, CHECKSUM: sha256})

    def read(self, expected: Mapping[str, Any]) -> dict[str, Any] | None:
        """The description, if it says what is expected and every byte is as it was written; otherwise None."""
        try:
            content = read_sealed(self.description)
            if any(content.get(name) != value for name, value in expected.items()):
                return None
            return content if self.is_whole(content[CHECKSUM]) else None
        except (OSError, ValueError, KeyError, DatastoreError):  # not there, or damaged: make it again
            return None

    def is_whole(self, sha256: str) -> bool:
        """Whether the binary file is there, with this checksum."""
        return self.path.is_file() and file_sha256(self.path) == sha256
