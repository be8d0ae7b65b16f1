"""Lines of a UTF-8 file, each decoded on its own so that one bad line does not cost the rest."""

from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from lightning_knnmt.data.readers.checks import PairChecker

# Far above any line of two sides at a sensible max_characters; it bounds memory on a file without line breaks.
_MIN_LINE_BYTES = 1 << 24
# A character costs at most 12 bytes (a JSON surrogate pair), a line has two sides.
_BYTES_PER_CHARACTER = 24


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a file.

    Attributes:
        where: File and line, counted from 1.
        text: Content without the line break, or None where it cannot be read.
        reason: Why it cannot be read, in the report's words.
        found: What stands there instead.
        expected: What should stand there.
    """

    where: str
    text: str | None
    reason: str = ""
    found: str = ""
    expected: str = ""


def numbered_lines(file: BinaryIO, max_characters: int) -> Iterator[Line]:
    r"""Reads lines that end in "\n" or "\r\n" and in nothing else.

    Args:
        file: A UTF-8 file open for reading bytes, with or without a byte order mark.
        max_characters: Longest side; lines that no two such sides can fill are not held in memory.
    """
    limit = max(_MIN_LINE_BYTES, _BYTES_PER_CHARACTER * max_characters)
    number = 0
    while raw := file.readline(limit):
        number += 1
        where = f"{file.name}:{number}"
        if number == 1:
            raw = raw.removeprefix(BOM_UTF8)
            if not raw:  # a byte order mark and nothing else
                return
        if len(raw) >= limit - len(BOM_UTF8) and not raw.endswith(b"\n"):
            while (rest := file.readline(limit)) and not rest.endswith(b"\n"):
                pass
            yield Line(where, None, "too long", f"a line of over {limit} bytes", "shorter lines")
            continue
        try:
            text = raw.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            found = f"the byte 0x{error.object[error.start]:02x} at position {error.start + 1} of the line"
            yield Line(where, None, "undecodable", found, "UTF-8")
        else:
            yield Line(where, text)


def readable_lines(file: BinaryIO, max_characters: int, checker: PairChecker) -> Iterator[tuple[str, str]]:
    """Reads lines and rejects those that cannot be read.

    Args:
        file: A UTF-8 file open for reading bytes.
        max_characters: As in `numbered_lines`.
        checker: Receives the unreadable lines.

    Returns:
        File and line, and the text.
    """
    for line in numbered_lines(file, max_characters):
        if line.text is None:
            checker.reject(line.where, line.reason, line.found, line.expected)
        else:
            yield line.where, line.text
