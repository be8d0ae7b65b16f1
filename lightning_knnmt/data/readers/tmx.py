"""TMX 1.4, the exchange format of translation memories, read one translation unit at a time."""

from collections.abc import Iterator
from typing import Any

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile, matches_language
from lightning_knnmt.data.readers.xml_units import UnresolvedEntityError, child_of, name_of, read_units, text_of

_XML_LANG = "{http://www.w3.org/XML/1998/namespace}lang"
_DOCUMENT_PROPS = ("x-document", "document", "filename")


def read_tmx(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the first variant of each language of every translation unit.

    Args:
        corpus: A TMX corpus.
        checker: Receives the raw sides.
    """
    for unit, where in read_units(corpus, checker, "tmx", ("tu",)):
        if pair := _read_unit(unit, where, corpus, checker):
            yield pair


def _read_unit(unit: Any, where: str, corpus: CorpusFile, checker: PairChecker) -> Pair | None:
    variants = [(child.get(_XML_LANG) or child.get("lang") or "", child) for child in unit if name_of(child) == "tuv"]
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
        document = _document(unit)
    except UnresolvedEntityError as error:
        checker.reject(where, "unresolved entity", str(error), "text; entities are not expanded")
        return None
    return checker.pair(src, tgt, document, where)


def _variant_text(variant: Any) -> str:
    segment = child_of(variant, "seg")
    return "" if segment is None else text_of(segment)


def _document(unit: Any) -> str:
    props = {child.get("type"): child for child in reversed(unit) if name_of(child) == "prop"}
    texts = (text_of(props[kind]) for kind in _DOCUMENT_PROPS if kind in props)
    return next((text for text in texts if text.strip()), "")
