"""Files of a datastore that belong together, opened while others may change it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import MANIFEST

T = TypeVar("T")
TRIES = 10  # one is in vain only if a change has come to its end meanwhile


def open_together(folder: Path, attempt: Callable[[], T], manifest: str = MANIFEST) -> T:
    """Open files that one manifest names; once more if they are gone since another manifest is in force by now.

    Args:
        folder: The datastore's.
        attempt: Reads the manifest and opens what it names; leaves nothing open if that fails.
        manifest: File name of the manifest.

    Raises:
        DatastoreError: What was wrong, though nobody has changed the manifest.
    """
    for _ in range(TRIES - 1):
        before = _content(folder / manifest)
        try:
            return attempt()
        except (DatastoreError, FileNotFoundError):
            if _content(folder / manifest) == before:
                raise
    return attempt()


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:
        return None
