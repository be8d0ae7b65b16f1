"""Tables: tab-separated text without quotes, and CSV as spreadsheets write it."""

import csv
from collections.abc import Iterator

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile
from lightning_knnmt.data.readers.lines import readable_lines
from lightning_knnmt.data.readers.opening import open_bytes

_EXPECTED = "the columns src, tgt and optionally document"
_NAMES = {"src": ("src", "source"), "tgt": ("tgt", "target", "trg"), "document": ("document", "doc")}
_DELIMITERS = (",", ";", "\t")


def read_tsv(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the columns src, tgt and optionally document, separated by tabs, without quoting.

    Args:
        corpus: A tab-separated corpus.
        checker: Receives the raw sides.
    """
    with open_bytes(corpus.path, recode=True) as file:
        lines = readable_lines(file, corpus.max_characters, checker)
        yield from _pairs(((where, text.split("\t")) for where, text in lines), corpus, checker)


def read_csv(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the columns src, tgt and optionally document; what separates them is told by the first line.

    Args:
        corpus: A CSV corpus, in which texts with line breaks are in quotes.
        checker: Receives the raw sides.
    """
    with open_bytes(corpus.path, recode=True) as file:
        yield from _pairs(_records(readable_lines(file, corpus.max_characters, checker), checker), corpus, checker)


def _records(lines: Iterator[tuple[str, str]], checker: PairChecker) -> Iterator[tuple[str, list[str]]]:
    where, first = next(lines, ("", None))
    if first is None:
        return
    fitting = [mark for mark in _DELIMITERS if _fits(first, mark)]
    if len(fitting) != 1:
        found = "a first line that can be read in several ways" if fitting else "a first line of another form"
        checker.reject(where, "no columns", found, f"{_EXPECTED}, separated by commas or semicolons; quote the texts")
        return
    places = [where]

    def rest() -> Iterator[str]:
        yield first + "\n"
        for place, line in lines:
            places[0] = place
            yield line + "\n"

    csv.field_size_limit(1 << 24)
    reader = csv.reader(rest(), delimiter=fitting[0], strict=True)
    try:
        for record in reader:
            yield places[0], record
    except csv.Error as error:
        checker.reject(places[0], "bad CSV", str(error), "quotes around texts that have quotes in them, each doubled")


def _fits(line: str, delimiter: str) -> bool:
    """Whether a line, or its part before a line break within quotes, has columns between delimiters."""
    for end in ("", '"'):
        try:
            return 2 <= len(next(csv.reader([line + end], delimiter=delimiter, strict=True), [])) <= 3
        except csv.Error:
            continue
    return False


def _pairs(rows: Iterator[tuple[str, list[str]]], corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Pairs of the rows of a table, all of which have as many columns as the first."""
    order: list[int] | None = None  # [src, tgt, document -> column]
    columns = 0
    for where, row in rows:
        if order is None and (header := _header(row, corpus)):
            order, columns = header, len(row)
            checker.report.skipped["header line"] += 1
            continue
        if order is None and 2 <= len(row) <= 3:
            order, columns = list(range(len(row))), len(row)
        if order is None or len(row) != columns:
            reason = "missing column" if len(row) < (columns or 2) else "extra column"
            found = f"{len(row)} column{'' if len(row) == 1 else 's'}"
            checker.reject(where, reason, found, f"{columns} columns as before" if columns else _EXPECTED)
        elif pair := _pair(row, order, where, checker):
            yield pair


def _pair(row: list[str], order: list[int], where: str, checker: PairChecker) -> Pair | None:
    src, tgt, document = [*(row[column] for column in order), ""][:3]
    return checker.pair(src, tgt, document, where)


def _header(row: list[str], corpus: CorpusFile) -> list[int] | None:
    """The columns that a header line names; None if it is none.

    >>> _header(["Target", "source", "note"], CorpusFile("a.tsv"))
    [1, 0]
    """
    cells = [cell.strip().casefold() for cell in row]
    languages = {"src": corpus.src_lang.casefold(), "tgt": corpus.tgt_lang.casefold(), "document": "document"}
    found = {
        name: cells.index(known)
        for name, names in _NAMES.items()
        for known in (*names, languages[name])
        if known in cells
    }
    if not {"src", "tgt"} <= set(found):
        return None
    return [found[name] for name in ("src", "tgt", "document") if name in found]
