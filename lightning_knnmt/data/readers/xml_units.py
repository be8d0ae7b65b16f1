"""What TMX and XLIFF have in common: units in XML, one at a time, and texts with native code inside."""

from collections.abc import Collection, Iterator
from typing import Any

from lxml import etree

from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile
from lightning_knnmt.data.readers.opening import open_bytes

_NATIVE_CODE = frozenset({"bpt", "ept", "ph", "it", "ut"})
# libxml2 keeps an element's line in 16 bits and guesses beyond
_MAX_LINE = 65535


class UnresolvedEntityError(Exception):
    """A text holds an entity that is not expanded."""


def read_units(
    corpus: CorpusFile, checker: PairChecker, root: str, units: Collection[str]
) -> Iterator[tuple[Any, str]]:
    """Elements of some names in file order, each freed when the next one is asked for.

    Entities in texts are never expanded, and neither DTDs nor the network are read, so a corpus from a stranger is
    safe. Within attributes libxml2 expands what the file itself declares, up to its limit of amplification.

    Args:
        corpus: The corpus.
        checker: Receives what is no such file.
        root: Name of the root element.
        units: Names of the elements that are wanted.

    Returns:
        The elements, and where each is.
    """
    with open_bytes(corpus.path) as file:
        events = etree.iterparse(
            file,
            events=("start", "end"),
            resolve_entities=False,
            load_dtd=False,
            no_network=True,
            huge_tree=False,
        )
        try:
            _, first = next(events)
            if name_of(first) != root:
                named = {"tmx": "TMX", "xliff": "XLIFF"}[root]
                checker.reject(f"{corpus.path}:1", f"not {named}", f"the root element <{name_of(first)}>", f"<{root}>")
                return
            number = 0
            for event, element in events:
                if event == "end" and name_of(element) in units:
                    number += 1
                    place = f":{element.sourceline}" if element.sourceline < _MAX_LINE else ""
                    yield element, f"{corpus.path}{place} (translation unit {number})"
                    _forget(element)
        except etree.XMLSyntaxError as error:
            line, column, problem = _first_problem(events, error)
            where = f"{corpus.path}:{line}:{column}"
            checker.reject(where, "broken XML", f"what XML does not allow ({problem})", f"well-formed <{root}>")


def text_of(element: Any) -> str:
    """The text of a segment: native code is left out, except for the sub-flows inside it.

    Raises:
        UnresolvedEntityError: It holds an entity.
    """
    inside_code = name_of(element) in _NATIVE_CODE
    parts = [] if inside_code else [element.text or ""]
    for child in element:
        if child.tag is etree.Entity:
            raise UnresolvedEntityError(child.text)
        if isinstance(child.tag, str):
            text = text_of(child)
            # a sub-flow, such as a caption inside an image's code, is a phrase of its own
            parts.append(f" {text.strip()} " if name_of(child) == "sub" and text.strip() else text)
        if not inside_code:
            parts.append(child.tail or "")
    return "".join(parts)


def child_of(element: Any, name: str) -> Any:
    """The first child of a name; None if there is none."""
    return next((child for child in element if name_of(child) == name), None)


def name_of(element: Any) -> str:
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
