"""Paragraphs cut into sentences, for models that see one sentence at a time."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from lightning_knnmt.data.pairs import Pair


@dataclass(frozen=True)
class Sentence:
    """A sentence of a text.

    Attributes:
        text: Without white space around it.
        gap: The white space behind it, up to the next sentence.
    """

    text: str
    gap: str = ""


class SentenceSplitter:
    """Cuts texts at the ends of sentences by the rules of their languages (sentencex, of Wikimedia).

    Args:
        languages: Codes of source and target, such as `en-pt`.

    Raises:
        ValueError: They are not two codes.
        ImportError: sentencex is not installed.
    """

    def __init__(self, languages: str) -> None:
        src, _, tgt = languages.partition("-")
        if not (src.isalpha() and tgt.isalpha()):
            raise ValueError(f"sentences is {languages!r}, expected codes of source and target such as 'en-pt'")
        try:
            from sentencex import segment
        except ImportError as error:
            raise ImportError("cutting texts into sentences needs `pip install sentencex`") from error
        self.languages, self._src, self._tgt, self._segment = languages, src, tgt, segment

    def split(self, text: str) -> list[Sentence]:
        """The sentences of a source text; a text without letters is one."""
        return self._split(self._src, text)

    def pairs(self, pairs: Iterable[Pair]) -> Iterator[Pair]:
        """The sentence pairs of paragraph pairs; one whose sides have different numbers of sentences stays whole."""
        for pair in pairs:
            sides = self._split(self._src, pair.src), self._split(self._tgt, pair.tgt)
            if len(sides[0]) == len(sides[1]):
                for src, tgt in zip(*sides, strict=True):
                    yield Pair(src.text, tgt.text, pair.document)
            else:
                yield pair

    def _split(self, language: str, text: str) -> list[Sentence]:
        found = []
        for piece in self._segment(language, text):
            if stripped := piece.strip():
                found.append(Sentence(stripped, piece[len(piece.rstrip()) :]))
        return found or [Sentence(text)]


def join(translations: Iterable[str], sentences: Iterable[Sentence]) -> str:
    """One text of the translations of a text's sentences, with the gaps that were between these.

    >>> join(["Um.", "Dois."], [Sentence("One.", "  "), Sentence("Two.")])
    'Um.  Dois.'
    """
    pieces = [text + sentence.gap for text, sentence in zip(translations, sentences, strict=True)]
    return "".join(pieces).rstrip() if len(pieces) > 1 else "".join(pieces)
