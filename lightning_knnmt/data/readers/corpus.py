"""Where a parallel corpus is on disk and how it is to be read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_knnmt.checks import check_at_least, check_one_of

FileFormat = Literal["text", "tsv", "csv", "jsonl", "tmx", "xliff", "po", "mo"]
Format = Literal["auto", "text", "tsv", "csv", "jsonl", "tmx", "xliff", "po", "mo"]
Side = Literal["auto", "src", "tgt"]
OnMalformed = Literal["error", "skip"]

_FORMAT_OF_SUFFIX: dict[str, FileFormat] = {
    ".txt": "text",
    ".tsv": "tsv",
    ".csv": "csv",
    ".jsonl": "jsonl",
    ".tmx": "tmx",
    ".xlf": "xliff",
    ".xliff": "xliff",
    ".po": "po",
    ".mo": "mo",
}


@dataclass(frozen=True)
class CorpusFile:
    """A parallel corpus on disk.

    Attributes:
        path: The file; for plain text its source side. It may be packed by gzip, and text, TSV, CSV and JSONL may be
            UTF-16 with a byte-order mark.
        tgt_path: The target side, for plain text only.
        format: Format of the file; `auto` goes by the suffix (before .gz), and an unknown suffix with `tgt_path` is
            plain text.
        src_lang: Source language; in TMX `de` also matches `de-DE`, in any case of letters.
        tgt_lang: Target language, matched as `src_lang` is.
        msgid_side: Gettext only: the side that msgid is on, `tgt` for German to English from an English program;
            `auto`: as the language in the file's header says, and `tgt` without one.
        malformed: Whether a malformed item stops the reading or is skipped and counted.
        empty: The same for a pair of which a side is empty.
        max_characters: Longest side in characters; a longer one is malformed.
    """

    path: Path
    tgt_path: Path | None = None
    format: Format = "auto"
    src_lang: str = "de"
    tgt_lang: str = "en"
    msgid_side: Side = "auto"
    malformed: OnMalformed = "error"
    empty: OnMalformed = "skip"
    max_characters: int = 5000

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        if self.tgt_path is not None:
            object.__setattr__(self, "tgt_path", Path(self.tgt_path))
        check_one_of(get_args(Format), format=self.format)
        check_one_of(get_args(Side), msgid_side=self.msgid_side)
        check_one_of(get_args(OnMalformed), malformed=self.malformed, empty=self.empty)
        check_at_least(1, max_characters=self.max_characters)
        self._check_languages()
        self._check_tgt_path()

    @property
    def file_format(self) -> FileFormat:
        """The format to read, with `auto` resolved.

        Raises:
            ValueError: If `format` is `auto` and the suffix says nothing.
        """
        if self.format != "auto":
            return self.format
        known = format_of_suffix(self.path)
        if known is not None:
            return known
        if self.tgt_path is not None:
            return "text"
        raise ValueError(
            f"format is auto, which does not know the suffix of {self.path}, expected one of "
            f"{', '.join(_FORMAT_OF_SUFFIX)}; set format, or give tgt_path for a pair of plain text files"
        )

    def _check_languages(self) -> None:
        for option, given in (("src_lang", self.src_lang), ("tgt_lang", self.tgt_lang)):
            if not given.strip():
                raise ValueError(f"{option} is {given!r}, expected a language code such as de or de-DE")
        if matches_language(self.src_lang, self.tgt_lang) or matches_language(self.tgt_lang, self.src_lang):
            raise ValueError(
                f"src_lang is {self.src_lang!r} and tgt_lang {self.tgt_lang!r}, of which one includes the other, "
                "expected two languages that can be told apart; name the regions of both if they differ by region"
            )

    def _check_tgt_path(self) -> None:
        file_format = self.file_format
        if file_format == "text" and self.tgt_path is None:
            raise ValueError(f"tgt_path is not given, expected the target side of the plain text file {self.path}")
        if file_format != "text" and self.tgt_path is not None:
            raise ValueError(
                f"tgt_path is {self.tgt_path}, expected none: {self.path} is read as {file_format}, which holds both "
                "sides; leave tgt_path out, or set format: text for plain text"
            )
        if self.tgt_path == self.path:
            raise ValueError(f"tgt_path is {self.tgt_path}, the same file as path, expected the target side's file")


def format_of_suffix(path: Path) -> FileFormat | None:
    """The format that a file name stands for; None if it says nothing.

    >>> format_of_suffix(Path("memory.tmx.gz"))
    'tmx'
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return _FORMAT_OF_SUFFIX.get(suffixes[-1]) if suffixes else None


def matches_language(wanted: str, found: str) -> bool:
    """Says whether a language code is the wanted language or one of its regional variants.

    Args:
        wanted: A code such as `de` or `de-AT`.
        found: The code of a segment.

    Examples:
        >>> matches_language("de", "de-DE"), matches_language("DE", "de_at"), matches_language("de-DE", "de")
        (True, True, False)
    """
    wanted, found = (code.strip().lower().replace("_", "-") for code in (wanted, found))
    return found == wanted or found.startswith(wanted + "-")
