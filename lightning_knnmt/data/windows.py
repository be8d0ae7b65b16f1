"""Documents cut into windows, for language models: every token is predicted once, with what stands before it."""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.pairs import Pair

# Where byte-level tokenizers cut in any case: behind the end of a line, and before a space between two words.
_LINE = re.compile(r"(?<=\S\n)(?=\S)")
_SPACE = re.compile(r"(?<=\S)(?= \S)")


@dataclass(frozen=True, slots=True)
class Window:
    """A part of a document, as a corpus of windows has it: white space counts.

    Attributes:
        context: What stands before it, of which no entries are made; empty where a document begins.
        text: What a model predicts.
        document: The document's name.
    """

    context: str
    text: str
    document: str = ""

    @property
    def src(self) -> str:
        """The context, which is a language model's source."""
        return self.context

    @property
    def tgt(self) -> str:
        """The text, which is its target."""
        return self.text

    @property
    def pair(self) -> Pair:
        """Context and text as source and target."""
        return Pair(self.context, self.text, self.document)

    @classmethod
    def is_one(cls, record: Mapping[str, Any]) -> bool:
        """Whether the fields of a line are those of a window, and not of a sentence pair."""
        return "context" in record and "text" in record


@dataclass(frozen=True)
class Windows:
    """How documents are cut.

    Attributes:
        characters: Longest window.
        overlap: Longest context, taken from the windows before.
    """

    characters: int = 1600
    overlap: int = 800

    def __post_init__(self) -> None:
        check_at_least(1, characters=self.characters)
        check_at_least(0, overlap=self.overlap)

    def __call__(self, documents: Iterable[Pair]) -> Iterator[Window]:
        """The windows of documents, whose texts are sources without targets, in their order."""
        for document in documents:
            yield from self.cut(document.src, document.document)

    def cut(self, text: str, document: str = "") -> Iterator[Window]:
        """The windows of a document, whose texts put together are the document.

        Args:
            text: The document.
            document: Its name.

        >>> [window.text for window in Windows(characters=12, overlap=4).cut("One, two, three and four.")]
        ['One, two,', ' three and', ' four.']
        """
        start = 0
        while start < len(text):
            end = self._end(text, start)
            yield Window(text[self._context_start(text, start) : start], text[start:end], document)
            start = end

    def _end(self, text: str, start: int) -> int:
        """Where a window ends: at the end of a line in its second half, before a word, or where it is full."""
        full = start + self.characters
        if full >= len(text):
            return len(text)
        for pattern, least in ((_LINE, start + self.characters // 2), (_SPACE, start)):
            found = pattern.finditer(text, least + 1, full + 2)  # patterns look one or two characters further
            if places := [place.start() for place in found if place.start() <= full]:
                return places[-1]
        return full

    def _context_start(self, text: str, start: int) -> int:
        """Where the context of a window begins: with a line or a word."""
        least = max(0, start - self.overlap)
        if least in (0, start):
            return least
        places = [found.start() for pattern in (_LINE, _SPACE) for found in pattern.finditer(text, least, start)]
        return min(places, default=least)
