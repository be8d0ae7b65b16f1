"""Files that are either whole or not there, whatever stops the process that writes them."""

import hashlib
import io
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import PARTIAL


def file_sha256(path: Path) -> str:
    """Checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path leads to a file directly in a folder, links followed."""
    return path.resolve().parent == folder.resolve()


def file_problem(path: Path, sha256: str, remedy: str) -> str | None:
    """What is wrong with a file, in words that follow its name; None if every byte is as it was written.

    Args:
        path: The file, expected directly in its folder.
        sha256: Its checksum.
        remedy: What to do.
    """
    if not path.is_file():
        return f"is missing; {remedy}"
    if not is_inside(path, path.parent):
        return f"is a link to {path.resolve()}, expected a file in the datastore's folder"
    return None if file_sha256(path) == sha256 else f"is damaged (its checksum is another); {remedy}"


class PartialFile(io.RawIOBase):
    """A file under a provisional name, which pretends to its writer that the disk is never full.

    HDF5 crashes the process if it cannot write, or read again, what it holds (HDF5 2.0), even long after the error. So
    the first error of the disk is kept for `check` and `finish`, and what is written from then on is held in memory:
    call `check` often.

    Args:
        path: Its final path.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self._partial = path.with_name(path.name + PARTIAL)
        self._partial.unlink(missing_ok=True)  # a link goes, and not what it names
        self._file = self._partial.open("x+b", buffering=0)
        self._position = self._size = 0
        self._unwritten: list[tuple[int, bytes]] = []  # [(position, content)]

    def write(self, data: Any) -> int:
        """Write all bytes."""
        rest = content = memoryview(data).cast("B")
        try:
            self._file.seek(self._position)
            while len(rest) and self.error is None:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            self.error = error
        if len(rest):
            self._unwritten.append((self._position, bytes(content)))
        self._position += len(content)
        self._size = max(self._size, self._position)
        return len(content)

    def readinto(self, buffer: Any) -> int:
        """Read what was written."""
        wanted = memoryview(buffer).cast("B")[: max(0, self._size - self._position)]
        self._file.seek(self._position)
        found = self._file.readinto(wanted)
        wanted[found:] = bytes(len(wanted) - found)
        for position, content in self._unwritten:
            first, last = max(position, self._position), min(position + len(content), self._position + len(wanted))
            if first < last:
                part = content[first - position : last - position]
                wanted[first - self._position : last - self._position] = part
        self._position += len(wanted)
        return len(wanted)

    def truncate(self, size: int | None = None) -> int:
        """Change the size."""
        self._size = self._position if size is None else size
        try:
            if self.error is None:
                self._file.truncate(self._size)
        except OSError as error:
            self.error = error
        return self._size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def check(self) -> None:
        """Raise the error that came before, if one did."""
        if self.error is not None:
            raise self.error

    def finish(self) -> None:
        """See to it that the disk has everything, and give the file its name."""
        try:
            self.check()
            os.fsync(self._file.fileno())
            self._file.close()
            self._partial.replace(self.path)
            sync_folder(self.path.parent)
        except OSError as error:
            self.error = error
            raise

    def discard(self) -> None:
        """Remove what was written."""
        self._file.close()
        self._partial.unlink(missing_ok=True)

    def close(self) -> None:
        """Close what was written, under its provisional name."""
        self._file.close()


@contextmanager
def durable_file(path: Path, keep: bool = False) -> Iterator[PartialFile]:
    """Write a file that gets its name when the block ends well and the disk has everything.

    Args:
        path: Its name.
        keep: Leave what was written under its provisional name if the block does not end well.

    Raises:
        DatastoreError: It could not be written; it then is as it was before.
    """
    try:
        file = PartialFile(path)
    except OSError as error:
        raise _not_written(path, error) from error
    try:
        yield file
        file.finish()
    except BaseException:
        file.close() if keep else file.discard()
        if file.error is not None:
            raise _not_written(path, file.error) from file.error
        raise


def write_text(path: Path, text: str) -> None:
    """Write a text file, whole or not at all; its folder is made if it is not there.

    Raises:
        DatastoreError: It could not be written; it then is as it was before.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _not_written(path, error) from error
    with durable_file(path) as file:
        file.write(text.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all; a number that JSON does not know, such as NaN, is null.

    Raises:
        DatastoreError: It could not be written; it then is as it was before.
    """
    write_text(path, json.dumps(_plain(content), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value


def link_or_copy(file: Path, to: Path) -> None:
    """Give a file that is never written to a second name, or copy it where a disk has no links.

    Raises:
        DatastoreError: It could not be copied.
    """
    to.unlink(missing_ok=True)
    try:
        os.link(file, to)
    except OSError:
        with durable_file(to) as copy, file.open("rb") as original:
            shutil.copyfileobj(original, copy)


def sync_folder(folder: Path) -> None:
    """See to it that the disk knows which files are in a folder."""
    if os.name == "nt":  # which cannot open folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _not_written(path: Path, error: OSError) -> DatastoreError:
    return DatastoreError(
        f"{path} could not be written ({error.strerror or error}); what was finished before it is kept: make room or "
        "allow writing there, then run the same command again, and it continues"
    )
