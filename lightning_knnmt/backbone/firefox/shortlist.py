"""Lexical shortlists: the target tokens that are likely for given source tokens."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SHORTLIST_FILE = "shortlist.bin"

_MAGIC = 0xF11A48D5013417F5
_HEADER = 6  # uint64: magic, checksum, frequent, best, number of offsets, number of targets
_MULTIPLE = 8


@dataclass(frozen=True)
class Shortlist:
    """Target tokens by source token.

    Attributes:
        frequent: The first so many token ids are allowed for every source.
        offsets: Where each source token's targets begin, shape (source tokens + 1,). [source id -> position]
        targets: Target ids, ascending for each source token.
    """

    frequent: int
    offsets: NDArray[np.int64]
    targets: NDArray[np.int64]

    def allowed(self, source_ids: Iterable[int], vocabulary_size: int, shared: bool) -> NDArray[np.int64]:
        """The target ids that Marian allows for a source, ascending.

        Their number is filled up to a multiple of eight with the most frequent other tokens, as Marian does.

        Args:
            source_ids: The source's tokens, with `</s>`.
            vocabulary_size: Target tokens in all, padding not counted.
            shared: Whether source and target have one vocabulary, so that each source token may be copied.

        Raises:
            ValueError: A source id has no place in the shortlist.
        """
        chosen = np.zeros(vocabulary_size, dtype=bool)
        chosen[: self.frequent] = True
        for source in set(source_ids):
            if not 0 <= source < len(self.offsets) - 1:
                raise ValueError(f"source id is {source}, expected 0 to {len(self.offsets) - 2}")
            if shared:
                chosen[source] = True
            chosen[self.targets[self.offsets[source] : self.offsets[source + 1]]] = True
        others = np.flatnonzero(~chosen[self.frequent :]) + self.frequent
        chosen[others[: -int(chosen.sum()) % _MULTIPLE]] = True
        return np.flatnonzero(chosen)


def read_shortlist(path: Path, vocabulary_size: int) -> Shortlist:
    """Read a binary shortlist of Marian or Bergamot (`lex.*.s2t.bin`).

    Args:
        path: The file.
        vocabulary_size: Target tokens in all, padding not counted.

    Raises:
        ValueError: The file is damaged or no shortlist.
        OSError: It cannot be read.
    """
    size = path.stat().st_size
    if size < 8 * _HEADER:
        raise _damaged(path, f"it has {size} bytes, expected {8 * _HEADER} or more")
    content = path.read_bytes()
    magic, checksum, frequent, _, sources, targets = np.frombuffer(content, dtype="<u8", count=_HEADER).tolist()
    if magic != _MAGIC:
        raise _damaged(path, f"it begins with {magic:#x}, expected {_MAGIC:#x}")
    if (expected := 8 * _HEADER + 8 * sources + 4 * targets) != size:
        raise _damaged(path, f"it has {size} bytes, expected {expected}")
    if (found := _checksum(content[16:])) != checksum:
        raise _damaged(path, f"its checksum is {found:#x}, expected {checksum:#x}")
    offsets = np.frombuffer(content, dtype="<u8", count=sources, offset=8 * _HEADER).astype(np.int64)
    ids = np.frombuffer(content, dtype="<u4", count=targets, offset=8 * (_HEADER + sources)).astype(np.int64)
    if not sources or offsets[0] != 0 or offsets[-1] != targets or (np.diff(offsets) < 0).any():
        raise _damaged(path, f"its offsets do not ascend from 0 to {targets}, expected that")
    if targets and ids.max() >= vocabulary_size:
        raise _damaged(path, f"it names the token {ids.max()}, expected less than {vocabulary_size}")
    return Shortlist(min(frequent, vocabulary_size), offsets, ids)


def _checksum(content: bytes) -> int:
    """Marian's hash of all whole uint64."""
    mask, seed = (1 << 64) - 1, 0
    for value in np.frombuffer(content, dtype="<u8", count=len(content) // 8).tolist():
        seed ^= (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) & mask
    return seed


def _damaged(path: Path, words: str) -> ValueError:
    return ValueError(f"{path} is damaged or no shortlist of Marian: {words}")
