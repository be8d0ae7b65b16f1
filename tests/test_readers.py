"""Readers of parallel corpora: what they yield, what they refuse, and what they never do."""

import gzip
import json
import os
import re
import struct
from itertools import islice
from pathlib import Path
from typing import Any

import polib
import pytest

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, MalformedCorpusError, ReadReport, read_pairs

PAIRS = [
    Pair("Öffnen Sie die Datei „Straße.txt“.", "Open the file “Straße.txt”.", "handbuch/öffnen"),
    Pair("Wählen Sie A & B, falls x < 3 ist.", "Choose A & B if x < 3.", "handbuch/wählen"),
    Pair("Das Fenster\u2028wird \x85geschlossen 🪟.", "The window\u2028is \x0cclosed 🪟.", "handbuch/wählen"),
    Pair('Er sagte: "Nein".', 'He said: "No".', "chat"),
]
HINT = "set malformed: skip to skip and count such lines"
PO_HEADER = 'msgid ""\nmsgstr ""\n"Content-Type: text/plain; charset=UTF-8\\n"\n\n'


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def text_corpus(folder: Path, src: str | bytes, tgt: str | bytes, **options: Any) -> CorpusFile:
    return CorpusFile(write(folder / "a.de", src), write(folder / "b.en", tgt), **options)


def tmx(*units: str, head: str = "") -> str:
    body = "\n".join(units)
    return f'<?xml version="1.0"?>\n{head}<tmx version="1.4"><header/><body>\n{body}\n</body></tmx>\n'


def unit(src: str, tgt: str, extra: str = "") -> str:
    return (
        f'<tu>{extra}<tuv xml:lang="EN-us"><seg>{tgt}</seg></tuv>'
        f'<tuv xml:lang="fr"><seg>Ouvrir</seg></tuv><tuv xml:lang="de-DE"><seg>{src}</seg></tuv></tu>'
    )


def escape(text: str) -> str:
    # a form feed is not allowed in XML at all
    return text.replace("&", "&amp;").replace("<", "&lt;").replace("\x0c", "")


def bare(pair: Pair) -> Pair:
    return Pair(pair.src, pair.tgt)


def skip_reasons(corpus: CorpusFile) -> tuple[list[Pair], dict[str, int]]:
    report = ReadReport()
    pairs = list(read_pairs(corpus, report))
    assert report.read == len(pairs)
    return pairs, dict(report.skipped)


# ---- round trips


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("last", [True, False], ids=["final newline", "no final newline"])
def test_text_round_trip_splits_on_newlines_only(tmp_path: Path, end: str, last: bool) -> None:
    src, tgt = (end.join(getattr(pair, side) for pair in PAIRS) + end * last for side in ("src", "tgt"))
    assert list(read_pairs(text_corpus(tmp_path, "\ufeff" + src, tgt))) == [bare(pair) for pair in PAIRS]


def test_tsv_round_trip_keeps_quotes_and_optional_document(tmp_path: Path) -> None:
    lines = [f"{pair.src}\t {pair.tgt} \t{pair.document}" for pair in PAIRS] + ["Ja\tYes\t"]
    path = write(tmp_path / "c.tsv", "\n".join(lines))
    assert list(read_pairs(CorpusFile(path))) == [*PAIRS, Pair("Ja", "Yes")]


@pytest.mark.parametrize("ascii_only", [True, False])
def test_jsonl_round_trip_in_both_layouts(tmp_path: Path, ascii_only: bool) -> None:
    flat = [{"src": p.src, "tgt": p.tgt, "document": p.document, "score": 0.5} for p in PAIRS]
    hugging_face = [{"id": "7", "document": None, "translation": {"de": p.src, "en": p.tgt}} for p in PAIRS]
    lines = [json.dumps(record, ensure_ascii=ascii_only) for record in flat + hugging_face]
    path = write(tmp_path / "c.jsonl", "\n".join(lines) + "\n")
    assert list(read_pairs(CorpusFile(path))) == PAIRS + [bare(pair) for pair in PAIRS]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("prop", ["x-document", "document", "filename"])
def test_tmx_round_trip(tmp_path: Path, encoding: str, prop: str) -> None:
    units = [unit(escape(p.src), escape(p.tgt), f'<prop type="{prop}">{p.document}</prop>') for p in PAIRS]
    content = tmx(*units)
    if encoding == "utf-16":
        content = content.replace('"1.0"', '"1.0" encoding="utf-16"')
    path = write(tmp_path / "c.tmx", content.encode(encoding))
    expected = [Pair(pair.src, pair.tgt.replace("\x0c", ""), pair.document) for pair in PAIRS]
    assert list(read_pairs(CorpusFile(path))) == expected


@pytest.mark.parametrize("suffix", ["po", "mo"])
@pytest.mark.parametrize("msgid_side", ["src", "tgt"])
def test_gettext_round_trip(tmp_path: Path, suffix: str, msgid_side: Any) -> None:
    catalog = polib.POFile()
    catalog.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for pair in PAIRS:
        msgid, msgstr = (pair.src, pair.tgt) if msgid_side == "src" else (pair.tgt, pair.src)
        catalog.append(polib.POEntry(msgid=msgid, msgstr=msgstr, msgctxt=pair.document))
    path = tmp_path / f"c.{suffix}"
    catalog.save(str(path)) if suffix == "po" else catalog.save_as_mofile(str(path))
    pairs = list(read_pairs(CorpusFile(path, msgid_side=msgid_side)))
    assert sorted(pairs, key=lambda pair: pair.src) == sorted(map(bare, PAIRS), key=lambda pair: pair.src)


# ---- what a format means


def test_line_breaks_inside_a_segment_become_single_spaces(tmp_path: Path) -> None:
    expected = [Pair("Guten Morgen, Welt", "Good morning")]
    src, tgt = " Guten\r\n  Morgen,\n\nWelt \n", "Good\n\tmorning\n"
    jsonl = write(tmp_path / "c.jsonl", json.dumps({"src": src, "tgt": tgt}))
    assert list(read_pairs(CorpusFile(jsonl))) == expected
    assert list(read_pairs(CorpusFile(write(tmp_path / "c.tmx", tmx(unit(src, tgt)))))) == expected
    po = write(tmp_path / "c.po", PO_HEADER + 'msgid "Good\\n"\n"\\tmorning\\n"\nmsgstr "Guten\\n\\nMorgen,\\nWelt"\n')
    assert list(read_pairs(CorpusFile(po))) == expected


def test_tmx_drops_native_code_and_keeps_highlights_and_sub_flows(tmp_path: Path) -> None:
    src = (
        'Ein <bpt i="1">&lt;b&gt;</bpt>fetter<ept i="1">&lt;/b&gt;</ept> <hi type="x">Tex<it pos="begin">{</it>t</hi>'
        '<!-- nein --> mit<ph>[img <sub>Bild <ph>%</ph>eins</sub> end]</ph>dabei<ph x="2"/>.'
    )
    path = write(tmp_path / "c.tmx", tmx(unit(src, "A bold text")))
    assert [pair.src for pair in read_pairs(CorpusFile(path))] == ["Ein fetter Text mit Bild eins dabei."]


def test_tmx_first_variant_of_a_language_wins_and_the_others_are_counted(tmp_path: Path) -> None:
    second = '<tuv xml:lang="de-AT"><seg>Der Jänner</seg></tuv></tu>'
    content = tmx(unit("Der Januar", "January").replace("</tu>", second), unit("Der Mai", "May"))
    path = write(tmp_path / "c.tmx", content)
    pairs, skipped = skip_reasons(CorpusFile(path))
    assert pairs == [Pair("Der Januar", "January"), Pair("Der Mai", "May")]
    assert skipped == {"repeated language": 1}
    pairs, skipped = skip_reasons(CorpusFile(path, src_lang="de-at", malformed="skip"))
    assert pairs == [Pair("Der Jänner", "January")]
    assert skipped == {"missing language": 1}


PO = (
    PO_HEADER
    + """#, fuzzy, c-format
msgid "Close"
msgstr "Schließ"

msgid "Quit"
msgstr ""

msgid "%d file"
msgid_plural "%d files"
msgstr[0] "%d Datei"
msgstr[1] "%d Dateien"

msgid "%d page"
msgid_plural "%d pages"
msgstr[0] "%d Seite"
msgstr[1] ""

#~ msgid "Old"
#~ msgstr "Alt"
"""
)


def test_po_counts_unfinished_entries_and_gives_both_plural_forms(tmp_path: Path) -> None:
    pairs, skipped = skip_reasons(CorpusFile(write(tmp_path / "c.po", PO)))
    assert pairs == [Pair("%d Datei", "%d file"), Pair("%d Dateien", "%d files"), Pair("%d Seite", "%d page")]
    assert skipped == {"fuzzy": 1, "untranslated": 2, "obsolete": 1}


def test_mo_gives_both_plural_forms(tmp_path: Path) -> None:
    path = tmp_path / "c.mo"
    polib.pofile(PO).save_as_mofile(str(path))
    pairs, _ = skip_reasons(CorpusFile(path))
    assert {Pair("%d Datei", "%d file"), Pair("%d Dateien", "%d files")} <= set(pairs)


# ---- malformed items, in both modes

GOOD = Pair("Guten Tag", "Good day")
LONG = "sehr lang " * 5
GOOD_JSON = json.dumps({"src": GOOD.src, "tgt": GOOD.tgt})
GOOD_TSV = f"{GOOD.src}\t{GOOD.tgt}"
GOOD_UNIT = unit(GOOD.src, GOOD.tgt)
GOOD_PO = f'msgid "{GOOD.tgt}"\nmsgstr "{GOOD.src}"\n\n'

TSV_CASES = [
    (b"nur eine Spalte", "missing column", "1 column"),
    (b"", "missing column", "1 column"),
    (b"a\tb\tc\td", "extra column", "4 columns"),
    (b"Hallo\t ", "empty side", "an empty target side"),
    (b"\tHello", "empty side", "an empty source side"),
    (b"Hallo\tHello\tdoc", "extra column", "3 columns"),
    (b"Ha\0llo\tHello", "NUL byte", "a NUL byte in the source side"),
    (b"Stra\xdfe\tstreet", "undecodable", "the byte 0xdf at position 5 of the line"),
    (b"kurz\t" + LONG.encode(), "too long", "49 characters on the target side, expected at most max_characters: 40"),
]
JSON_CASES = [
    (b'{"src": "a", ', "bad JSON", '\'{"src": "a", \''),
    (b"[" * 100_000, "bad JSON", "'[[["),
    (b"", "bad JSON", "''"),
    (b'["a", "b"]', "not an object", "a JSON list"),
    (b'{"src": "Hallo", "target": "Hello"}', "missing key", "the keys src, target"),
    (b'{"translation": {"de": "Hallo", "fr": "Salut"}}', "missing key", "the keys de, fr"),
    (b'{"translation": "Hallo"}', "missing key", "a translation without keys"),
    (b'{"src": "Hallo", "tgt": 3}', "not a string", "a int under 'tgt'"),
    (b'{"src": "Hallo", "tgt": "Hello", "document": 3}', "not a string", "a int under 'document'"),
    (b'{"src": "Hallo", "tgt": "\\ud83d"}', "undecodable", "half a surrogate pair under 'tgt'"),
    (b'{"src": "Hallo", "tgt": "\\u0000 x"}', "NUL byte", "a NUL byte in the target side"),
    (b'{"src": "a", "tgt": "x", "document": "\\u0000"}', "NUL byte", "a NUL byte in the document name"),
    (b'{"src": "\\n", "tgt": "x"}', "empty side", "an empty source side"),
    (b'{"src": "\xff", "tgt": "x"}', "undecodable", "the byte 0xff at position 10"),
]
LINE_CASES = [("c.tsv", GOOD_TSV, *case) for case in TSV_CASES] + [("c.jsonl", GOOD_JSON, *case) for case in JSON_CASES]


@pytest.mark.parametrize(("name", "good", "bad", "reason", "found"), LINE_CASES)
def test_malformed_line_stops_or_is_counted(
    tmp_path: Path, name: str, good: str, bad: bytes, reason: str, found: str
) -> None:
    path = write(tmp_path / name, good.encode() + b"\n" + bad + b"\n" + good.encode())
    with pytest.raises(MalformedCorpusError, match=re.escape(f"{path}:2: {reason}: found {found}")) as error:
        list(read_pairs(CorpusFile(path, max_characters=40, empty="error")))
    assert HINT.replace("malformed", "empty" if reason == "empty side" else "malformed") in str(error.value)
    assert skip_reasons(CorpusFile(path, max_characters=40, malformed="skip")) == ([GOOD, GOOD], {reason: 1})


@pytest.mark.parametrize("side", ["src", "tgt"])
@pytest.mark.parametrize(
    ("bad", "reason"),
    [(b"", "empty side"), (b"M\xe4rz", "undecodable"), (b"a\0b", "NUL byte"), (LONG.encode(), "too long")],
)
def test_malformed_text_line_names_the_file_of_its_side(tmp_path: Path, side: str, bad: bytes, reason: str) -> None:
    lines = {"src": [b"Guten Tag", b"Hallo", b"Guten Tag"], "tgt": [b"Good day", b"Hello", b"Good day"]}
    lines[side][1] = bad
    corpus = text_corpus(
        tmp_path, *(b"\n".join(lines[key]) for key in ("src", "tgt")), max_characters=40, empty="error"
    )
    path = corpus.path if side == "src" else corpus.tgt_path
    with pytest.raises(MalformedCorpusError, match=re.escape(f"{path}:2: {reason}: found ")):
        list(read_pairs(corpus))
    corpus = CorpusFile(corpus.path, corpus.tgt_path, max_characters=40, malformed="skip")
    assert skip_reasons(corpus) == ([GOOD, GOOD], {reason: 1})


@pytest.mark.parametrize("longer", ["src", "tgt"])
def test_different_line_counts_are_named_or_the_surplus_is_counted(tmp_path: Path, longer: str) -> None:
    src, tgt = "Eins\nZwei\n", "One\nTwo\n"
    if longer == "src":
        src += "Drei\nVier\n\n"
    else:
        tgt += "Three\nFour\n\n"
    corpus = text_corpus(tmp_path, src, tgt)
    names = [corpus.path, corpus.tgt_path]
    long, short = names if longer == "src" else reversed(names)
    message = f"{long}:3: no counterpart: found 5 lines in {long} but 2 lines in {short}"
    with pytest.raises(MalformedCorpusError, match=re.escape(message)) as error:
        list(read_pairs(corpus))
    assert HINT in str(error.value)
    pairs, skipped = skip_reasons(text_corpus(tmp_path, src, tgt, malformed="skip"))
    assert pairs == [Pair("Eins", "One"), Pair("Zwei", "Two")]
    assert skipped == {"no counterpart": 3}


def test_line_beyond_the_byte_limit_is_skipped_without_losing_the_next(tmp_path: Path) -> None:
    path = write(tmp_path / "c.tsv", b"x" * (2**24 + 2**24 // 2) + b"\n" + GOOD_TSV.encode())
    assert skip_reasons(CorpusFile(path, malformed="skip")) == ([GOOD], {"too long": 1})


TMX_CASES = [
    (unit("", "Hello"), "empty side", "an empty source side"),
    (unit("Hallo", LONG), "too long", "49 characters"),
    (unit("Hallo", "Hello").replace("EN-us", "es"), "missing language", "es, fr, de-DE, expected a <tuv> in en"),
    (unit("Hallo", "Hello").replace('xml:lang="de-DE"', ""), "missing language", "EN-us, fr, no xml:lang"),
    ("<tu/>", "missing language", "no variants"),
]


@pytest.mark.parametrize(("bad", "reason", "found"), TMX_CASES)
def test_malformed_tmx_unit_stops_or_is_counted(tmp_path: Path, bad: str, reason: str, found: str) -> None:
    path = write(tmp_path / "c.tmx", tmx(GOOD_UNIT, bad, GOOD_UNIT))
    message = f"{path}:4 (translation unit 2): {reason}: found {found}"
    with pytest.raises(MalformedCorpusError, match=re.escape(message)) as error:
        list(read_pairs(CorpusFile(path, max_characters=40, empty="error")))
    assert HINT.replace("malformed", "empty" if reason == "empty side" else "malformed") in str(error.value)
    assert skip_reasons(CorpusFile(path, max_characters=40, malformed="skip")) == ([GOOD, GOOD], {reason: 1})


@pytest.mark.parametrize(
    "tail", [b"<tu><tuv></seg>", b"<tu>", b"\0", b"<tu><tuv><seg>\xff", b"<tu><tuv xml:lang='de'><seg>&undeclared;"]
)
def test_broken_tmx_keeps_what_stands_before_the_break(tmp_path: Path, tail: bytes) -> None:
    content = tmx(GOOD_UNIT, GOOD_UNIT).encode()
    path = write(tmp_path / "c.tmx", content[: content.index(b"</body>")] + tail)
    with pytest.raises(MalformedCorpusError, match=rf"{re.escape(str(path))}:5:\d+: broken XML: found .*{HINT}"):
        list(read_pairs(CorpusFile(path)))
    assert skip_reasons(CorpusFile(path, malformed="skip")) == ([GOOD, GOOD], {"broken XML": 1})


@pytest.mark.parametrize(
    ("content", "reason"), [("", "broken XML"), ("plain", "broken XML"), ("<html><tu/></html>", "not TMX")]
)
def test_file_that_is_no_tmx_is_refused(tmp_path: Path, content: str, reason: str) -> None:
    path = write(tmp_path / "c.tmx", content)
    with pytest.raises(MalformedCorpusError, match=reason):
        list(read_pairs(CorpusFile(path)))
    assert skip_reasons(CorpusFile(path, malformed="skip")) == ([], {reason: 1})


def test_malformed_po_entry_stops_or_is_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "c.po", PO_HEADER + GOOD_PO + f'msgid "long"\nmsgstr "{LONG}"\n')
    with pytest.raises(MalformedCorpusError, match=rf"{re.escape(str(path))}:8: too long: .*{HINT}"):
        list(read_pairs(CorpusFile(path, max_characters=40)))
    assert skip_reasons(CorpusFile(path, max_characters=40, malformed="skip")) == ([GOOD], {"too long": 1})


@pytest.mark.parametrize("malformed", ["error", "skip"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"no catalog", "Syntax error"),
        (PO_HEADER.encode() + b'msgid "a"\nmsgstr "\xff"\n', "'utf-8' codec can't decode"),
        (PO_HEADER.encode() + b'msgid "a"\nmsgstr "abgeschnit', r"line \d: a string without its closing quote"),
        (b'msgstr "Anfang fehlt"\n', "Syntax error"),
    ],
)
def test_broken_po_is_always_refused(tmp_path: Path, content: bytes, reason: str, malformed: Any) -> None:
    path = write(tmp_path / "c.po", content)
    message = rf"{re.escape(str(path))}: not a readable gettext \.po file \(.*{reason}"
    with pytest.raises(MalformedCorpusError, match=message):
        list(read_pairs(CorpusFile(path, malformed=malformed)))


@pytest.mark.parametrize("malformed", ["error", "skip"])
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("garbage", "no magic number 0x950412de at its start"),
        ("empty", "0 bytes, a header has 20"),
        ("short", "a string reaches past the end of the file"),
        ("huge count", "a table of 4294967295 strings reaches past the end of the file"),
        ("latin-1", "'utf-8' codec can't decode"),
    ],
)
def test_broken_mo_is_always_refused(tmp_path: Path, damage: str, reason: str, malformed: Any) -> None:
    path = tmp_path / "c.mo"
    polib.pofile(PO).save_as_mofile(str(path))
    data = path.read_bytes()
    damaged = {
        "garbage": b"\x7fELF" + data,
        "empty": b"",
        "short": data[:-3],
        "huge count": data[:8] + struct.pack("<I", 2**32 - 1) + data[12:],
        "latin-1": data.replace(b"Dateien", b"Datei\xe4n"),
    }[damage]
    write(path, damaged)
    message = rf"{re.escape(str(path))}: not a readable gettext \.mo file \({reason}"
    with pytest.raises(MalformedCorpusError, match=message):
        list(read_pairs(CorpusFile(path, malformed=malformed)))


# ---- what a reader never does


@pytest.mark.parametrize("where", ["text", "attribute"])
def test_tmx_entities_are_not_expanded(tmp_path: Path, where: str) -> None:
    laughs = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
    head = f'<!DOCTYPE tmx [<!ENTITY l0 "haha">{laughs}]>\n'
    bad = unit("&l9;", "Ha") if where == "text" else unit("Ha", "Ha", '<prop type="&l9;">x</prop>')
    path = write(tmp_path / "c.tmx", tmx(GOOD_UNIT, bad, head=head))
    with pytest.raises(MalformedCorpusError, match=r"broken XML: found .*amplification"):
        list(read_pairs(CorpusFile(path)))
    assert skip_reasons(CorpusFile(path, malformed="skip")) == ([GOOD], {"broken XML": 1})


def test_tmx_segment_with_an_internal_entity_is_refused_and_character_references_are_read(tmp_path: Path) -> None:
    units = [unit("Das Pr&#xFC;fger&#228;t &amp; ich", "The tester &amp; I"), unit("Die &firma;", "The company")]
    path = write(tmp_path / "c.tmx", tmx(*units, GOOD_UNIT, head='<!DOCTYPE tmx [<!ENTITY firma "GmbH">]>\n'))
    with pytest.raises(MalformedCorpusError, match=r":5 \(translation unit 2\): unresolved entity: found &firma;"):
        list(read_pairs(CorpusFile(path)))
    expected = [Pair("Das Prüfgerät & ich", "The tester & I"), GOOD]
    assert skip_reasons(CorpusFile(path, malformed="skip")) == (expected, {"unresolved entity": 1})


@pytest.mark.parametrize("declaration", ['<!ENTITY x SYSTEM "{uri}">', '<!ENTITY % p SYSTEM "{uri}">%p;'])
def test_tmx_external_entities_and_dtds_are_not_read(tmp_path: Path, declaration: str) -> None:
    secret = write(tmp_path / "secret.dtd", '<!ENTITY x "Passwort">')
    head = f'<!DOCTYPE tmx SYSTEM "{secret.as_uri()}" [{declaration.format(uri=secret.as_uri())}]>\n'
    path = write(tmp_path / "c.tmx", tmx(GOOD_UNIT, unit("Das ist &x;", "This is it"), head=head))
    assert skip_reasons(CorpusFile(path, malformed="skip")) == ([GOOD], {"unresolved entity": 1})


def test_pairs_come_before_a_broken_tail_is_read(tmp_path: Path) -> None:
    broken = [
        CorpusFile(write(tmp_path / "c.tsv", f"{GOOD_TSV}\nkaputt\n")),
        CorpusFile(write(tmp_path / "c.jsonl", f"{GOOD_JSON}\n{{\n")),
        CorpusFile(write(tmp_path / "c.tmx", tmx(*[GOOD_UNIT] * 1000) + "<")),
        text_corpus(tmp_path, "Guten Tag\nHallo\n", "Good day\n"),
    ]
    for corpus in broken:
        pairs = read_pairs(corpus)
        assert list(islice(pairs, 1)) == [GOOD]
        with pytest.raises(MalformedCorpusError):
            list(pairs)


def test_tmx_tree_does_not_grow_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_knnmt.data.readers import tmx as module

    sizes = []
    read_unit = module._read_unit

    def spy(element: Any, *rest: Any) -> Pair | None:
        sizes.append(sum(1 for _ in element.getroottree().iter()))
        return read_unit(element, *rest)

    monkeypatch.setattr(module, "_read_unit", spy)
    path = write(tmp_path / "c.tmx", tmx(*[GOOD_UNIT + "<!-- x --><note>y</note>"] * 2000))
    assert len(list(read_pairs(CorpusFile(path)))) == 2000
    # libxml2 parses one block ahead, which bounds the tree; the whole file has over 18,000 nodes
    assert max(sizes) < 4000
    assert sizes[-1] < 4000


def test_report_says_every_count_in_one_line() -> None:
    report = ReadReport(read=3)
    report.skipped.update(["too long", "empty side", "too long"])
    assert str(report) == "read 3 pairs, skipped 3 (too long: 2, empty side: 1)"


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "a.txt"}, "tgt_path is not given, expected the target side of the plain text file a.txt"),
        ({"path": "a.xyz"}, "format is auto, which does not know the suffix of a.xyz, expected one of .txt, .tsv"),
        ({"path": "a.tmx", "tgt_path": "b.en"}, "tgt_path is b.en, expected none: a.tmx is read as tmx"),
        ({"path": "a.de", "tgt_path": "a.de"}, "the same file as path"),
        ({"path": "a.tsv", "format": "xml"}, "format is 'xml', expected one of auto, text"),
        ({"path": "a.tsv", "malformed": "warn"}, "malformed is 'warn', expected one of error, skip"),
        ({"path": "a.tsv", "msgid_side": "de"}, "msgid_side is 'de', expected one of auto, src, tgt"),
        ({"path": "a.tsv", "max_characters": 0}, "max_characters is 0, expected 1 or more"),
        ({"path": "a.tsv", "src_lang": " "}, "src_lang is ' ', expected a language code"),
        (
            {"path": "a.tsv", "src_lang": "en-GB"},
            "src_lang is 'en-GB' and tgt_lang 'en', of which one includes the other",
        ),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CorpusFile(**options)


@pytest.mark.parametrize("name", ["a.de", "a.txt", "a", "a.mo"])
def test_format_can_be_told_by_suffix_or_option(name: str) -> None:
    chosen: Any = "text" if name == "a.mo" else "auto"
    assert CorpusFile(Path(name), Path("b.en"), format=chosen).file_format == "text"


def test_missing_file_or_folder_is_refused_at_the_call(tmp_path: Path) -> None:
    source = write(tmp_path / "a.de", "Hallo\n")
    with pytest.raises(FileNotFoundError, match=r"path is .*nothing\.po, which does not exist, expected a corpus file"):
        read_pairs(CorpusFile(tmp_path / "nothing.po"))
    with pytest.raises(FileNotFoundError, match=r"tgt_path is .*b\.en, which does not exist"):
        read_pairs(CorpusFile(source, tmp_path / "b.en"))
    (tmp_path / "folder.tmx").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder\.tmx, which is a folder, expected a corpus file"):
        read_pairs(CorpusFile(tmp_path / "folder.tmx"))


# ---- direction


@pytest.mark.parametrize("suffix", ["po", "mo"])
@pytest.mark.parametrize("language", ["en", "en_GB", "de", "de@informal", ""])
def test_a_catalog_is_read_as_the_language_in_its_header_says(
    tmp_path: Path, suffix: str, language: str, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = polib.POFile()
    catalog.metadata = {"Content-Type": "text/plain; charset=UTF-8"} | ({"Language": language} if language else {})
    msgid, msgstr = ("Hallo", "Hello") if language.startswith("en") else ("Hello", "Hallo")
    catalog.append(polib.POEntry(msgid=msgid, msgstr=msgstr))
    path = tmp_path / f"c.{suffix}"
    catalog.save(str(path)) if suffix == "po" else catalog.save_as_mofile(str(path))
    with caplog.at_level("INFO"):
        assert list(read_pairs(CorpusFile(path))) == [Pair("Hallo", "Hello")]
    side = "source" if language.startswith("en") else "target"
    assert f"read as {suffix} with msgid as {side}, first pair 'Hallo' → 'Hello'" in caplog.text
    if language:
        wrong: Any = "tgt" if side == "source" else "src"
        for options in ({"msgid_side": wrong}, {"src_lang": "fr", "tgt_lang": "it"}):
            with pytest.raises(MalformedCorpusError, match="its header says that msgstr is in"):
                list(read_pairs(CorpusFile(path, **options)))


def test_the_first_pair_of_every_format_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name, content in (("c.tsv", GOOD_TSV), ("c.jsonl", GOOD_JSON), ("c.tmx", tmx(GOOD_UNIT))):
        with caplog.at_level("INFO"):
            list(read_pairs(CorpusFile(write(tmp_path / name, content))))
        assert "first pair 'Guten Tag' → 'Good day'" in caplog.text
        caplog.clear()


# ---- columns


def test_a_stray_tab_makes_no_other_pair(tmp_path: Path) -> None:
    path = write(tmp_path / "c.tsv", "Hallo\tHello\nJa\tdoch\tYes\nNein\tNo\n")
    with pytest.raises(MalformedCorpusError, match=r"c\.tsv:2: extra column: found 3 columns, expected 2 columns as"):
        list(read_pairs(CorpusFile(path)))
    pairs, skipped = skip_reasons(CorpusFile(path, malformed="skip"))
    assert pairs == [Pair("Hallo", "Hello"), Pair("Nein", "No")] and skipped == {"extra column": 1}


@pytest.mark.parametrize("head", ["tgt\tsrc\tnote\tdoc", "EN\tDe\tnote\tdocument", "target\tSource\tnote\tdoc"])
def test_a_header_line_names_the_columns(tmp_path: Path, head: str) -> None:
    path = write(tmp_path / "c.tsv", f"{head}\nHello\tHallo\tx\tpage\n")
    assert skip_reasons(CorpusFile(path)) == ([Pair("Hallo", "Hello", "page")], {"header line": 1})


@pytest.mark.parametrize("mark", [",", ";"])
def test_csv_round_trip(tmp_path: Path, mark: str) -> None:
    rows = [Pair('Er sagte: "Nein, Danke; ja"\tund', "He said, no"), Pair("Zwei\nZeilen", "Two\nlines")]
    text = "".join(mark.join('"' + side.replace('"', '""') + '"' for side in (p.src, p.tgt)) + "\r\n" for p in rows)
    pairs = list(read_pairs(CorpusFile(write(tmp_path / "c.csv", text))))
    assert pairs == [rows[0], Pair("Zwei Zeilen", "Two lines")]


def test_a_csv_file_that_can_be_read_in_two_ways_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "c.csv", "Hallo, Welt;Hello\n")
    with pytest.raises(MalformedCorpusError, match="no columns: found a first line that can be read in several ways"):
        list(read_pairs(CorpusFile(path)))


# ---- damage and size


def test_a_catalog_whose_strings_are_shifted_or_repeated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c.mo"
    polib.pofile(PO).save_as_mofile(str(path))
    data = path.read_bytes()
    ids, texts = struct.unpack_from("<2I", data, 12)
    for table, longer, later in ((ids, 0, 1), (texts, -1, 0), (texts, 0, -1)):
        length, offset = struct.unpack_from("<2I", data, table + 8)
        bad = data[: table + 8] + struct.pack("<2I", length + longer, offset + later) + data[table + 16 :]
        with pytest.raises(MalformedCorpusError, match="a string does not end where its table says"):
            list(read_pairs(CorpusFile(write(path, bad))))
    # many strings that are all the same large one
    text = b"a" * 10_000 + b"\0"
    tables = struct.pack("<2I", 10_000, 28 + 16_000) * 2000
    bomb = struct.pack("<7I", 0x950412DE, 0, 1000, 28, 28 + 8000, 0, 0) + tables + text
    with pytest.raises(MalformedCorpusError, match="a string does not end where its table says"):
        list(read_pairs(CorpusFile(write(path, bomb))))


def test_messages_do_not_quote_megabytes(tmp_path: Path) -> None:
    many = "".join(f'<tuv xml:lang="x{i}"><seg>a</seg></tuv>' for i in range(100_000))
    long = json.dumps({"a" * 2_000_000: 1})
    for path in (
        write(tmp_path / "c.tmx", tmx(f"<tu>{many}</tu>")),
        write(tmp_path / "c.jsonl", long),
        write(tmp_path / "c.po", PO_HEADER + "x" * 2_000_000),
    ):
        with pytest.raises(MalformedCorpusError) as error:
            list(read_pairs(CorpusFile(path)))
        assert len(str(error.value)) < 1500


def test_an_empty_side_is_skipped_and_counted_unless_it_is_to_be_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "c.tsv", f"{GOOD_TSV}\nHallo\t \n\tHello\n")
    assert skip_reasons(CorpusFile(path)) == ([GOOD], {"empty side": 2})
    with pytest.raises(MalformedCorpusError, match=re.escape("(--datastore.corpus.empty skip; --test.empty skip")):
        list(read_pairs(CorpusFile(path, empty="error")))


def test_what_is_skipped_is_logged_where_nobody_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    list(read_pairs(CorpusFile(write(tmp_path / "c.tsv", f"{GOOD_TSV}\nHallo\t\n"))))
    assert "read 1 pairs, skipped 1 (empty side: 1)" in caplog.text


def test_a_document_name_with_an_entity_is_not_cut(tmp_path: Path) -> None:
    head = '<!DOCTYPE tmx [<!ENTITY firma "GmbH">]>\n'
    units = (
        unit("a", "b", '<prop type="document">Die &firma; hier</prop>'),
        unit("c", "d", '<prop type="document">A&amp;B</prop>'),
    )
    path = write(tmp_path / "c.tmx", tmx(*units, head=head))
    pairs, skipped = skip_reasons(CorpusFile(path, malformed="skip"))
    assert pairs == [Pair("c", "d", "A&B")] and skipped == {"unresolved entity": 1}


# ---- XLIFF, gzip, UTF-16

XLIFF_1 = """<xliff version="1.2" xmlns="urn:oasis:names:tc:xliff:document:1.2">
<file original="page.html" source-language="{src}" target-language="{tgt}" datatype="html"><body>
<group><trans-unit id="1"><source>{a} <bpt id="1">&lt;b&gt;</bpt>{b}<ept id="1">&lt;/b&gt;</ept></source>
<target>{c} <g id="1">{d}</g></target><alt-trans>
<source>no</source><target>nein</target></alt-trans>
</trans-unit></group><trans-unit id="2"><source>later</source></trans-unit>
<trans-unit id="3"><source>later</source><target state="needs-translation">later</target></trans-unit>
</body></file></xliff>"""
XLIFF_2 = """<xliff version="2.1" srcLang="{src}" trgLang="{tgt}" xmlns="urn:oasis:names:tc:xliff:document:2.0">
<file id="page.html"><unit id="1"><segment state="final"><source>{a} <pc id="1">{b}</pc></source>
<target>{c} <pc id="1">{d}</pc><ph id="2"/></target></segment>
<segment state="initial"><source>later</source><target>later</target></segment>
<segment><source>later</source></segment></unit></file></xliff>"""


@pytest.mark.parametrize("form", [XLIFF_1, XLIFF_2], ids=["1.2", "2.1"])
@pytest.mark.parametrize("backwards", [False, True])
def test_xliff_round_trip_in_both_directions(tmp_path: Path, form: str, backwards: bool) -> None:
    forwards = {"src": "de-DE", "tgt": "en-US", "a": "Ein", "b": "Wort", "c": "One", "d": "word"}
    turned = {"src": "en-US", "tgt": "de-DE", "a": "One", "b": "word", "c": "Ein", "d": "Wort"}
    content = form.format(**(turned if backwards else forwards))
    for name, data in (("c.xlf", content.encode()), ("c.xliff.gz", gzip.compress(content.encode()))):
        path = write(tmp_path / name, data)
        pairs, skipped = skip_reasons(CorpusFile(path))
        assert pairs == [Pair("Ein Wort", "One word", "page.html")] and skipped == {"untranslated": 2}
    with pytest.raises(MalformedCorpusError, match="missing language: found"):
        list(read_pairs(CorpusFile(path, src_lang="fr")))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be", "utf-8-sig"])
@pytest.mark.parametrize("packed", [False, True])
def test_gzip_and_byte_order_marks_are_read(tmp_path: Path, encoding: str, packed: bool) -> None:
    mark = "\ufeff" if encoding == "utf-16-be" else ""

    def file(name: str, text: str) -> Path:
        data = (mark + text).encode(encoding)
        return write(tmp_path / (f"{name}.gz" if packed else name), gzip.compress(data) if packed else data)

    lines = "".join(f"{pair.src}\t{pair.tgt}\n" for pair in PAIRS)
    assert list(read_pairs(CorpusFile(file("c.tsv", lines)))) == [bare(pair) for pair in PAIRS]
    sides = [file(f"{side}.txt", "".join(f"{getattr(p, side)}\n" for p in PAIRS)) for side in ("src", "tgt")]
    assert list(read_pairs(CorpusFile(*sides))) == [bare(pair) for pair in PAIRS]
    whole = write(tmp_path / "p.po.gz", gzip.compress((PO_HEADER + GOOD_PO).encode()))
    assert list(read_pairs(CorpusFile(whole))) == [GOOD]


def test_a_damaged_gzip_file_is_named(tmp_path: Path) -> None:
    packed = gzip.compress("".join(f"Hallo {i}\tHello {i}\n" for i in range(5000)).encode())
    for data in (packed[: len(packed) // 2], packed[:500] + bytes(50) + packed[550:]):
        path = write(tmp_path / "c.tsv.gz", data)
        with pytest.raises(MalformedCorpusError):
            list(read_pairs(CorpusFile(path, malformed="skip")))


def test_a_pipe_is_no_corpus(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "c.tsv")
    with pytest.raises(ValueError, match=r"c\.tsv is a folder, a pipe or a device, expected a file"):
        list(read_pairs(CorpusFile(tmp_path / "c.tsv")))
