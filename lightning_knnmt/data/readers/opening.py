"""Files as bytes: what was packed by gzip is unpacked, and UTF-16 with a byte-order mark becomes UTF-8."""

import codecs
import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, cast

from lightning_knnmt.data.readers.checks import MalformedCorpusError

_UTF_16 = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
_GZIP = b"\x1f\x8b"
MOST_BYTES = 1 << 28  # of a file that is read whole; a catalog of a million texts has less


class _Recoded:
    """A UTF-16 file whose lines are UTF-8.

    Args:
        file: Begins with a byte-order mark.
        name: Of the file.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self.name = name
        self._text = io.TextIOWrapper(file, encoding="utf-16", errors="surrogatepass", newline="\n")

    def readline(self, limit: int = -1) -> bytes:
        return self._text.readline(limit).encode("utf-8", "surrogatepass")

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.readline, b"")


@contextmanager
def open_bytes(path: Path, recode: bool = False) -> Iterator[BinaryIO]:
    """Open a file for reading.

    Args:
        path: The file, perhaps packed by gzip, whatever it is called.
        recode: Give lines in UTF-8 if the file is UTF-16 with a byte-order mark; otherwise bytes as they are.

    Raises:
        MalformedCorpusError: Within the block: it is cut off or damaged.
        ValueError: It is a pipe or a device.
    """
    with _regular(path) as raw:
        packed = raw.peek(2)[:2] == _GZIP
        file = cast(io.BufferedReader, gzip.GzipFile(str(path), fileobj=raw)) if packed else raw
        try:
            is_utf_16 = recode and file.peek(2)[:2] in _UTF_16
            yield cast(BinaryIO, _Recoded(cast(BinaryIO, file), str(path))) if is_utf_16 else cast(BinaryIO, file)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise MalformedCorpusError(f"{path} is a damaged gzip file ({error}), expected a whole one") from error
        except UnicodeDecodeError as error:
            raise MalformedCorpusError(f"{path} is damaged UTF-16 ({error.reason}), expected text in it") from error


def read_whole(path: Path) -> bytes:
    """All bytes of a file, unpacked.

    Raises:
        MalformedCorpusError: It is damaged, or far too large.
    """
    with open_bytes(path) as file:
        content = file.read(MOST_BYTES + 1)
    if len(content) > MOST_BYTES:
        raise MalformedCorpusError(f"{path} has over {MOST_BYTES} bytes, expected less in a file that is read whole")
    return content


def _regular(path: Path) -> io.BufferedReader:
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a folder, a pipe or a device, expected a file")
    return io.BufferedReader(io.FileIO(os.fspath(path)), 1 << 16)
