"""JSON Lines: one object a line, flat or in the layout of Hugging Face's translation datasets."""

import json
from collections.abc import Iterator
from typing import Any

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile
from lightning_knnmt.data.readers.lines import readable_lines
from lightning_knnmt.data.readers.opening import open_bytes


def read_jsonl(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads objects with src, tgt and optionally document, or with translation: {src_lang: ..., tgt_lang: ...}.

    Args:
        corpus: A JSONL corpus.
        checker: Receives the raw sides.
    """
    with open_bytes(corpus.path, recode=True) as file:
        for where, text in readable_lines(file, corpus.max_characters, checker):
            sides = _parse(text, where, corpus, checker)
            if sides is not None and (pair := checker.pair(*sides, where)):
                yield pair


def _parse(text: str, where: str, corpus: CorpusFile, checker: PairChecker) -> tuple[str, str, str] | None:
    layouts = (
        'an object {"src": ..., "tgt": ...} or '
        f'{{"translation": {{"{corpus.src_lang}": ..., "{corpus.tgt_lang}": ...}}}}'
    )
    try:
        record: Any = json.loads(text)
    except (ValueError, RecursionError) as error:
        checker.reject(where, "bad JSON", f"{text[:60]!r} ({error})", layouts)
        return None
    if not isinstance(record, dict):
        checker.reject(where, "not an object", f"a JSON {type(record).__name__}", layouts)
        return None
    sides, keys = record, ("src", "tgt")
    if "translation" in record and "src" not in record:
        sides, keys = record["translation"], (corpus.src_lang, corpus.tgt_lang)
    if not isinstance(sides, dict) or any(key not in sides for key in keys):
        found = f"the keys {', '.join(sides) or 'none'}" if isinstance(sides, dict) else "a translation without keys"
        checker.reject(where, "missing key", found, layouts)
        return None
    document = record.get("document")
    # null stands for an absent document: it is what dataset exports write there
    values = (sides[keys[0]], sides[keys[1]], "" if document is None else document)
    for key, value in zip((*keys, "document"), values, strict=True):
        if not isinstance(value, str):
            checker.reject(where, "not a string", f"a {type(value).__name__} under {key!r}", "strings")
            return None
        if not _is_unicode(value):
            checker.reject(where, "undecodable", f"half a surrogate pair under {key!r}", "Unicode text")
            return None
    return values


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
