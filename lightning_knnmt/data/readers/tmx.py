"""TMX 1.4, the exchange format of translation memories, read one translation unit at a time."""

from collections.abc import Iterator
from typing import Any

from lxml import etree

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile, matches_language

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_NATIVE_CODE = frozenset({"bpt", "ept", "ph", "it", "ut"})
_DOCUMENT_PROPS = ("x-document", "document", "filename")
# libxml2 keeps an element's line in 16 bits and guesses beyond
_MAX_LINE = 65535


class _UnresolvedEntityError(Exception):
    """A segment holds an entity that is not expanded."""


def read_tmx(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the first variant of each language of every translation unit.

    Entities are never expanded, and neither DTDs nor the network are read, so a corpus from a stranger is safe.

    Args:
        corpus: A TMX corpus.
        checker: Receives the raw sides.
    """
    with corpus.path.open("rb") as file:
        events = etree.iterparse(
            file,
            events=("start", "end"),
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            huge_tree=False,
        )
        try:
            _, root = next(events)
            if _name(root) != "tmx":
                checker.reject(f"{corpus.path}:1", "not TMX", f"the root element <{_name(root)}>", "<tmx>")
                return
            number = 0
            for event, element in events:
                if event == "end" and _name(element) == "tu":
                    number += 1
                    if pair := _read_unit(element, number, corpus, checker):
                        yield pair
                    _forget(element)
        except etree.XMLSyntaxError as error:
            line, column, problem = _first_problem(events, error)
            where = f"{corpus.path}:{line}:{column}"
            checker.reject(where, "broken XML", f"what XML does not allow ({problem})", "well-formed TMX 1.4")


def _read_unit(unit: Any, number: int, corpus: CorpusFile, checker: PairChecker) -> Pair | None:
    line = f":{unit.sourceline}" if unit.sourceline < _MAX_LINE else ""
    where = f"{corpus.path}{line} (translation unit {number})"
    variants = [(child.get(_XML_LANG) or child.get("lang") or "", child) for child in unit if _name(child) == "tuv"]
    sides = []
    for language in (corpus.src_lang, corpus.tgt_lang):
        matching = [variant for code, variant in variants if matches_language(language, code)]
        if not matching:
            codes = ", ".join(code or "no xml:lang" for code, _ in variants) or "no variants"
            checker.reject(where, "missing language", codes, f"a <tuv> in {language} (src_lang and tgt_lang)")
            return None
        if len(matching) > 1:
            checker.report.skipped["repeated language"] += len(matching) - 1
        sides.append(matching[0])
    try:
        src, tgt = (_variant_text(variant) for variant in sides)
    except _UnresolvedEntityError as error:
        checker.reject(where, "unresolved entity", str(error), "text; entities are not expanded")
        return None
    return checker.pair(src, tgt, _document(unit), where)


def _variant_text(variant: Any) -> str:
    return next((_segment_text(child) for child in variant if _name(child) == "seg"), "")


def _segment_text(element: Any) -> str:
    """The text of a segment: native code is left out, except for the sub-flows inside it."""
    inside_code = _name(element) in _NATIVE_CODE
    parts = [] if inside_code else [element.text or ""]
    for child in element:
        if child.tag is etree.Entity:
            raise _UnresolvedEntityError(child.text)
        if isinstance(child.tag, str):
            text = _segment_text(child)
            # a sub-flow, such as a caption inside an image's code, is a phrase of its own
            parts.append(f" {text.strip()} " if _name(child) == "sub" and text.strip() else text)
        if not inside_code:
            parts.append(child.tail or "")
    return "".join(parts)


def _document(unit: Any) -> str:
    props = {child.get("type"): child.text or "" for child in reversed(unit) if _name(child) == "prop"}
    return next((props[kind] for kind in _DOCUMENT_PROPS if props.get(kind, "").strip()), "")


def _name(element: Any) -> str:
    """Name without namespace; empty for comments, processing instructions and entities."""
    return element.tag.rpartition("}")[2] if isinstance(element.tag, str) else ""


def _first_problem(events: etree.iterparse, error: etree.XMLSyntaxError) -> tuple[int, int, str]:
    """Line, column and message; the parser's log has them also where the exception says only that nothing came."""
    for entry in events.error_log.filter_from_errors():
        return entry.line, entry.column, " ".join(entry.message.split())
    line, column = error.position
    return line, column, " ".join(error.msg.split())


def _forget(element: Any) -> None:
    """Frees a unit and everything before it, which lxml would otherwise keep until the end of the file."""
    element.clear()
    parent = element.getparent()
    while element.getprevious() is not None:
        del parent[0]
