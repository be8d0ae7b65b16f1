"""Gettext catalogs, the translations of programs: .po as people write them and .mo as programs load them."""

import re
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import polib

from lightning_knnmt.checks import shorten
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import MalformedCorpusError, PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile, matches_language
from lightning_knnmt.data.readers.opening import read_whole

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
        MalformedCorpusError: If the file is no .po file, or of other languages, whatever `malformed` says.
    """
    yield from _pairs(corpus, checker)


def read_mo(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the translations of a .mo file.

    Args:
        corpus: A .mo corpus.
        checker: Receives the raw sides.

    Raises:
        MalformedCorpusError: If the file is no .mo file, or of other languages, whatever `malformed` says.
    """
    yield from _pairs(corpus, checker)


def msgid_side(corpus: CorpusFile) -> Literal["src", "tgt"]:
    """The side that msgid is on.

    Raises:
        MalformedCorpusError: The language in the header contradicts the option, or is neither of the corpus.
    """
    return _side(corpus, _load(corpus).metadata.get("Language", ""))


def _side(corpus: CorpusFile, language: str) -> Literal["src", "tgt"]:
    language = language.partition("@")[0]
    fits = {
        "src": matches_language(corpus.tgt_lang, language) or matches_language(language, corpus.tgt_lang),
        "tgt": matches_language(corpus.src_lang, language) or matches_language(language, corpus.src_lang),
    }
    wanted: Literal["src", "tgt"] = "src" if corpus.msgid_side == "src" else "tgt"
    if not language.strip():
        return wanted
    if corpus.msgid_side == "auto" and fits["src"] != fits["tgt"]:
        return "src" if fits["src"] else "tgt"
    if fits[wanted]:
        return wanted
    known = f"src_lang is {corpus.src_lang!r}, tgt_lang {corpus.tgt_lang!r} and msgid_side {corpus.msgid_side!r}"
    raise MalformedCorpusError(
        f"{corpus.path}: its header says that msgstr is in {shorten(language, 20)!r}, but {known}; expected "
        "options that fit the header"
    )


def _load(corpus: CorpusFile) -> Any:
    path, suffix = corpus.path, corpus.file_format
    content = read_whole(path)
    try:
        with tempfile.TemporaryDirectory() as folder:
            plain = Path(folder, f"plain.{suffix}")
            plain.write_bytes(content)
            if suffix == "mo":
                _check_mo(content)
                return polib.mofile(str(plain))
            _check_po(plain)
            return polib.pofile(str(plain))
    except Exception as error:  # polib has no error of its own
        expected = {
            "mo": "what `msgfmt` writes. Compile it again, or give the .po file.",
            "po": "msgid and msgstr entries in the charset that its header names. Check it with `msgfmt --check`.",
        }[suffix]
        reason = shorten(str(error).replace(str(plain), path.name))
        raise MalformedCorpusError(
            f"{path}: not a readable gettext .{suffix} file ({reason}); expected {expected}"
        ) from error


def _pairs(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    catalog = _load(corpus)
    side = _side(corpus, catalog.metadata.get("Language", ""))
    for number, entry in enumerate(catalog, start=1):
        place = f"entry {number}" if corpus.file_format == "mo" else str(max(entry.linenum, 1))
        yield from _entry_pairs(entry, f"{corpus.path}:{place}", side, checker)


def _entry_pairs(entry: Any, where: str, side: str, checker: PairChecker) -> Iterator[Pair]:
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
        src, tgt = (msgid, msgstr) if side == "src" else (msgstr, msgid)
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
    """Refuses strings that polib would shorten, shift or repeat in silence: each ends in a NUL, and none overlap."""
    if len(data) < 20:
        raise ValueError(f"{len(data)} bytes, a header has 20")
    order = next((order for order in "<>" if struct.unpack_from(order + "I", data)[0] == _MAGIC), None)
    if order is None:
        raise ValueError("no magic number 0x950412de at its start")
    count, *tables = struct.unpack_from(order + "8x3I", data)
    for table in tables:
        if table + 8 * count > len(data):
            raise ValueError(f"a table of {count} strings reaches past the end of the file")
        total = 0
        for length, offset in struct.iter_unpack(order + "2I", data[table : table + 8 * count]):
            if offset + length >= len(data):
                raise ValueError("a string reaches past the end of the file")
            if data[offset + length] != 0 or (total := total + length + 1) > len(data):
                raise ValueError("a string does not end where its table says")
