"""JSON Lines: one object a line, flat, in the layout of Hugging Face's translation datasets, or a document's window."""

import json
from collections.abc import Iterator
from typing import Any

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile
from lightning_knnmt.data.readers.lines import readable_lines
from lightning_knnmt.data.readers.opening import open_bytes
from lightning_knnmt.data.windows import Window


def read_jsonl(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads objects with src, tgt and optionally document, or with translation: {src_lang: ..., tgt_lang: ...}.

    Objects with context and text are windows of a document, whose white space counts and whose context may be empty.

    Args:
        corpus: A JSONL corpus.
        checker: Receives the raw sides.
    """
    with open_bytes(corpus.path, recode=True) as file:
        for where, text in readable_lines(file, corpus.max_characters, checker):
            sides = _parse(text, where, corpus, checker)
            if isinstance(sides, Window):
                if window := _checked(sides, where, corpus, checker):
                    yield window.pair
            elif sides is not None and (pair := checker.pair(*sides, where)):
                yield pair


def _checked(window: Window, where: str, corpus: CorpusFile, checker: PairChecker) -> Window | None:
    longest = max(len(window.context), len(window.text))
    if "\0" in window.context + window.text + window.document:
        checker.reject(where, "NUL byte", "a NUL byte", "text without NUL bytes")
    elif not window.text:
        checker.reject(where, "empty text", "an empty text", "a window with a text")
    elif longest > corpus.max_characters:
        limit = f"at most max_characters: {corpus.max_characters}"
        checker.reject(where, "too long", f"{longest} characters", limit)
    else:
        checker.report.read += 1
        return window
    return None


def _parse(text: str, where: str, corpus: CorpusFile, checker: PairChecker) -> tuple[str, str, str] | Window | None:
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
    is_window = Window.is_one(record) and "src" not in record
    sides, keys = record, ("context", "text") if is_window else ("src", "tgt")
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
    return Window(*values) if is_window else values


def _is_unicode(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
