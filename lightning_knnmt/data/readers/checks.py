"""What every reader checks in a pair, and the count of what it left out."""

import re
from collections import Counter
from dataclasses import dataclass, field

from lightning_knnmt.checks import shorten
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.corpus import CorpusFile

EMPTY = "empty side"
_LINE_BREAK = re.compile(r"[ \t]*[\r\n][ \t\r\n]*")


class MalformedCorpusError(ValueError):
    """A corpus holds something that is no pair."""


@dataclass
class ReadReport:
    """Counts of what a reader met; nothing is dropped silently.

    Attributes:
        read: Pairs that came out.
        skipped: Items left out or set aside, [reason -> count].
    """

    read: int = 0
    skipped: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One line with every count, the largest reason first.

        Examples:
            >>> ReadReport(7, Counter({"empty side": 2, "too long": 1})).summary()
            'read 7 pairs, skipped 3 (empty side: 2, too long: 1)'
        """
        reasons = ", ".join(f"{reason}: {count}" for reason, count in self.skipped.most_common())
        return f"read {self.read} pairs, skipped {self.skipped.total()}" + (f" ({reasons})" if reasons else "")

    def __str__(self) -> str:
        return self.summary()


class PairChecker:
    """Turns raw sides into pairs, and treats what is malformed as the corpus asks.

    Args:
        corpus: Its `malformed` and `max_characters` are applied.
        report: Counts every pair and every skipped item.
    """

    def __init__(self, corpus: CorpusFile, report: ReadReport) -> None:
        self.report = report
        self._skip = corpus.malformed == "skip"
        self._skip_empty = self._skip or corpus.empty == "skip"
        self._max_characters = corpus.max_characters

    def reject(self, where: str, reason: str, found: str, expected: str) -> None:
        """Counts a malformed item under `malformed: skip`, stops at it under `malformed: error`.

        Args:
            where: File and line of the item.
            reason: Fixed short words that the report counts by.
            found: What stands there.
            expected: What should stand there.

        Raises:
            MalformedCorpusError: Under `malformed: error`.
        """
        if not self._skip:
            option = "empty" if reason == EMPTY else "malformed"
            raise MalformedCorpusError(
                f"{where}: {reason}: found {shorten(found)}, expected {expected}; mend the file, "
                f"or set {option}: skip to skip and count such lines (--datastore.corpus.{option} skip; "
                f"--test.{option} skip in evaluate.py)"
            )
        self.report.skipped[reason] += 1

    def pair(self, src: str, tgt: str, document: str, where: str, tgt_where: str | None = None) -> Pair | None:
        """Cleans both sides and checks them.

        Args:
            src: Raw source side.
            tgt: Raw target side.
            document: Raw document name, may be empty.
            where: File and line of the source side.
            tgt_where: File and line of the target side, where they differ.

        Returns:
            The pair, counted as read, or None where it is malformed and was counted as skipped.

        Raises:
            MalformedCorpusError: Under `malformed: error`.
        """
        pair = Pair(clean(src), clean(tgt), clean(document))
        sides = (("source side", pair.src, where), ("target side", pair.tgt, tgt_where or where))
        for name, text, place in (*sides, ("document name", pair.document, where)):
            if "\0" in text:
                self.reject(place, "NUL byte", f"a NUL byte in the {name}", "text without NUL bytes")
                return None
        for name, text, place in sides:
            if not text:
                if self._skip_empty:
                    self.report.skipped[EMPTY] += 1
                else:
                    self.reject(place, EMPTY, f"an empty {name}", "text on both sides")
                return None
            if len(text) > self._max_characters:
                limit = f"at most max_characters: {self._max_characters}"
                self.reject(place, "too long", f"{len(text)} characters on the {name}", limit)
                return None
        self.report.read += 1
        return pair


def clean(text: str) -> str:
    r"""Strips surrounding whitespace and turns line breaks into single spaces.

    Examples:
        >>> clean(" Guten \n\t Morgen\r\n")
        'Guten Morgen'
    """
    return _LINE_BREAK.sub(" ", text.strip())
