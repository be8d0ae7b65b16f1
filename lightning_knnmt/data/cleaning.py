"""From the strings of program catalogs and help pages to running text."""

import html
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.pairs import Pair

_TAG = re.compile(r"</?[A-Za-z][^<>]*>")
_SPACE = re.compile(r"\s+")
_LETTER = re.compile(r"[^\W\d_]")
_ACCELERATOR = {mark: re.compile(rf"{mark}(?=\w)") for mark in "&_~"}


def strip_markup(text: str) -> str:
    """Remove tags, resolve character references and collapse white space.

    >>> strip_markup("Use <b>Save&nbsp;as</b>&hellip;\\n now")
    'Use Save as… now'
    """
    return _SPACE.sub(" ", html.unescape(_TAG.sub("", text))).strip()


def strip_accelerators(src: str, tgt: str) -> tuple[str, str]:
    """Remove the keyboard accelerator marks (``&File``, ``_File``, ``~File``) of a menu entry.

    A mark counts as an accelerator only if it stands exactly once on each side, before a letter or digit.

    >>> strip_accelerators("_Datei öffnen", "_Open file")
    ('Datei öffnen', 'Open file')
    >>> strip_accelerators("R&D-Abteilung", "research department")
    ('R&D-Abteilung', 'research department')
    """
    for mark, pattern in _ACCELERATOR.items():
        if src.count(mark) == tgt.count(mark) == 1 and pattern.search(src) and pattern.search(tgt):
            src, tgt = pattern.sub("", src), pattern.sub("", tgt)
    return src, tgt


@dataclass(frozen=True)
class Cleaning:
    """What is done to each pair before the splits are drawn.

    Attributes:
        markup: Strip tags and character references.
        accelerators: Strip the accelerator marks of menu entries.
        max_length_ratio: Drop pairs whose longer side has more than this many times the characters of the shorter
            (sides under 20 characters count as 20).
        max_words: Drop pairs with a side of more white-space separated words.
        drop_identical: Drop pairs whose sides are the same text of three words or more (left untranslated).
    """

    markup: bool = True
    accelerators: bool = True
    max_length_ratio: float = 3.0
    max_words: int = 150
    drop_identical: bool = True

    def __post_init__(self) -> None:
        if not self.max_length_ratio >= 1:  # refuses nan, too
            raise ValueError(f"max_length_ratio is {self.max_length_ratio}, expected 1 or more")
        check_at_least(1, max_words=self.max_words)

    def __call__(self, pairs: Iterable[Pair], dropped: Counter[str]) -> Iterator[Pair]:
        """Yield the cleaned pairs and count the others, by reason, in `dropped`."""
        for pair in pairs:
            src, tgt = pair.src, pair.tgt
            if self.markup:
                src, tgt = strip_markup(src), strip_markup(tgt)
            if self.accelerators:
                src, tgt = strip_accelerators(src, tgt)
            reason = self._reason_to_drop(src, tgt)
            if reason:
                dropped[reason] += 1
            else:
                yield Pair(src, tgt, pair.document)

    def _reason_to_drop(self, src: str, tgt: str) -> str | None:
        if not _LETTER.search(src) or not _LETTER.search(tgt):
            return "no letters"
        if max(len(src.split()), len(tgt.split())) > self.max_words:
            return "too many words"
        short, long = sorted((max(len(src), 20), max(len(tgt), 20)))
        if long > self.max_length_ratio * short:
            return "length ratio"
        if self.drop_identical and src == tgt and len(src.split()) >= 3:
            return "not translated"
        return None
