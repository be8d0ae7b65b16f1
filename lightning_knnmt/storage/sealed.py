"""JSON files that carry a checksum of themselves."""

import hashlib
import json
from pathlib import Path
from typing import Any

from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import write_text

FORMAT = 2  # version of the layout of a datastore and of the descriptions of its indexes
LARGEST_FILE = 1 << 28  # bytes; a datastore of a billion entries has a manifest of less than a megabyte


def write_sealed(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with its format and checksum, whole or not at all.

    Raises:
        DatastoreError: It could not be written.
    """
    text = _text(content)
    if len(text) > LARGEST_FILE:
        raise DatastoreError(f"{path} would have {len(text)} bytes, expected no more than {LARGEST_FILE}")
    write_text(path, text)


def content_sha256(content: dict[str, Any]) -> str:
    """The checksum that a file of this content has."""
    return hashlib.sha256(_text(content).encode()).hexdigest()


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of such a file, if not a byte of it has changed.

    Raises:
        DatastoreError: It was written by another version.
        ValueError: It is damaged.
    """
    if not path.is_file():
        raise ValueError("it is a folder, a pipe or a device, expected a file")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"it has {path.stat().st_size} bytes, expected no more than {LARGEST_FILE}")
    text = path.read_bytes().decode()
    try:
        content = json.loads(text)
        if not isinstance(content, dict):
            raise ValueError(f"it holds {type(content).__name__}, expected an object")
        if content.get("format") != FORMAT:
            raise DatastoreError(f"{path} has format {content.get('format')!r}, expected {FORMAT}; build it again")
        content.pop("sha256", None)
        del content["format"]
        if _text(content) != text:
            raise ValueError("its checksum does not fit its content")
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return content


def _text(content: dict[str, Any]) -> str:
    content = {"format": FORMAT, **content}
    digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
    return json.dumps({**content, "sha256": digest}, indent=2) + "\n"
