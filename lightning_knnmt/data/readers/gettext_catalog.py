"""Gettext catalogs, the translations of programs: .po as people write them and .mo as programs load them."""

import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polib

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import MalformedCorpusError, PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile

_KEYWORD = r"msg(?:ctxt|id|id_plural|str(?:\[\d+\])?)"
_STRING_LINE = re.compile(rf'(?:#~\s*)?(?:{_KEYWORD}\s*)?"')
_WHOLE_STRING_LINE = re.compile(rf'(?:#~\s*)?(?:{_KEYWORD}\s*)?"(?:[^"\\]|\\.)*"')
_MAGIC = 0x950412DE


def read_po(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the finished translations of a .po file; fuzzy, obsolete and untranslated ones are counted.

    Args:
        corpus: A .po corpus.
        checker: Receives the raw sides.

    Raises:
        MalformedCorpusError: If the file is no .po file, whatever `malformed` says.
    """
    path = corpus.path
    path.open("rb").close()  # a permission problem is not a syntax error
    try:
        _check_po(path)
        catalog = polib.pofile(str(path))
    except Exception as error:  # polib has no error of its own
        raise MalformedCorpusError(
            f"{path}: not a readable gettext .po file ({error}); expected msgid and msgstr entries in the charset that "
            "its header names. Check it with `msgfmt --check`."
        ) from error
    for entry in catalog:
        yield from _entry_pairs(entry, f"{path}:{max(entry.linenum, 1)}", corpus, checker)


def read_mo(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the translations of a .mo file.

    Args:
        corpus: A .mo corpus.
        checker: Receives the raw sides.

    Raises:
        MalformedCorpusError: If the file is no .mo file, whatever `malformed` says.
    """
    path = corpus.path
    data = path.read_bytes()
    try:
        _check_mo(data)
        catalog = polib.mofile(str(path))
    except Exception as error:  # polib has no error of its own
        raise MalformedCorpusError(
            f"{path}: not a readable gettext .mo file ({error}); expected what `msgfmt` writes. "
            "Compile it again, or give the .po file."
        ) from error
    for number, entry in enumerate(catalog, start=1):
        yield from _entry_pairs(entry, f"{path}:entry {number}", corpus, checker)


def _entry_pairs(entry: Any, where: str, corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    skipped = checker.report.skipped
    if entry.obsolete:
        skipped["obsolete"] += 1
        return
    if "fuzzy" in entry.flags:
        skipped["fuzzy"] += 1
        return
    forms = [(entry.msgid, entry.msgstr)]
    if entry.msgid_plural:
        plural = entry.msgstr_plural
        forms = [(entry.msgid, plural.get(0, ""))]
        if 1 in plural:
            forms.append((entry.msgid_plural, plural[1]))
    for msgid, msgstr in forms:
        if not msgstr.strip():
            skipped["untranslated"] += 1
            continue
        src, tgt = (msgid, msgstr) if corpus.msgid_side == "src" else (msgstr, msgid)
        if pair := checker.pair(src, tgt, "", where):
            yield pair


def _check_po(path: Path) -> None:
    """Refuses strings without their closing quote, whose last letter polib would cut off in silence."""
    with path.open(encoding=polib.detect_encoding(str(path))) as file:
        for number, line in enumerate(file, start=1):
            line = line.strip().removeprefix("\ufeff")
            if _STRING_LINE.match(line) and not _WHOLE_STRING_LINE.fullmatch(line):
                raise ValueError(f"line {number}: a string without its closing quote")


def _check_mo(data: bytes) -> None:
    """Refuses strings that reach past the end of the file, which polib would shorten in silence."""
    if len(data) < 20:
        raise ValueError(f"{len(data)} bytes, a header has 20")
    order = next((order for order in "<>" if struct.unpack_from(order + "I", data)[0] == _MAGIC), None)
    if order is None:
        raise ValueError("no magic number 0x950412de at its start")
    count, *tables = struct.unpack_from(order + "8x3I", data)
    for table in tables:
        if table + 8 * count > len(data):
            raise ValueError(f"a table of {count} strings reaches past the end of the file")
        for length, offset in struct.iter_unpack(order + "2I", data[table : table + 8 * count]):
            if offset + length > len(data):
                raise ValueError("a string reaches past the end of the file")
