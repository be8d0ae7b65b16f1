"""XLIFF 1.2 and 2.x, in which translators exchange their work, read one segment at a time."""

from collections.abc import Iterator
from typing import Any

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile, matches_language
from lightning_knnmt.data.readers.xml_units import UnresolvedEntityError, child_of, name_of, read_units, text_of

_UNFINISHED = ("new", "needs-", "initial")  # beginnings of the states of a target that nobody vouches for


def read_xliff(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads every trans-unit (1.2) and segment (2.x) that has a finished target; the others are counted.

    A file of the other direction, such as English to German for a corpus from German to English, is read backwards.

    Args:
        corpus: An XLIFF corpus.
        checker: Receives the raw sides.
    """
    for unit, where in read_units(corpus, checker, "xliff", ("trans-unit", "segment")):
        if pair := _read_unit(unit, where, corpus, checker):
            yield pair


def _read_unit(unit: Any, where: str, corpus: CorpusFile, checker: PairChecker) -> Pair | None:
    above = {name_of(element): element for element in unit.iterancestors()}
    file = above.get("file", unit)
    languages = (
        file.get("source-language") or above["xliff"].get("srcLang") or "",
        file.get("target-language") or above["xliff"].get("trgLang") or "",
    )
    wanted = (corpus.src_lang, corpus.tgt_lang)
    forwards, backwards = _match(wanted, languages), _match(wanted, languages[::-1])
    if not (forwards or backwards):
        found = " to ".join(code or "no language" for code in languages)
        checker.reject(where, "missing language", found, " and ".join(wanted) + " (src_lang and tgt_lang)")
        return None
    source, target = child_of(unit, "source"), child_of(unit, "target")
    if target is None or _state(unit, target).startswith(_UNFINISHED):
        checker.report.skipped["untranslated"] += 1
        return None
    try:
        texts = ("" if source is None else text_of(source), text_of(target))
    except UnresolvedEntityError as error:
        checker.reject(where, "unresolved entity", str(error), "text; entities are not expanded")
        return None
    src, tgt = texts if forwards else texts[::-1]
    return checker.pair(src, tgt, file.get("original") or file.get("id") or "", where)


def _match(wanted: tuple[str, ...], found: tuple[str, ...]) -> bool:
    return all(matches_language(*codes) for codes in zip(wanted, found, strict=True))


def _state(unit: Any, target: Any) -> str:
    return target.get("state") or unit.get("state") or ""
