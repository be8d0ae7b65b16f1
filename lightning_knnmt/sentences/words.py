"""Words, which sentences are compared by."""

import re

_SINGLE = (
    "\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"  # kana and ideographs: scripts without spaces, each character a word
)
_WORD = re.compile(rf"[{_SINGLE}]|[^\W{_SINGLE}]+|[^\w\s]")


def words(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case.

    >>> words("Press Ctrl+C, 中文.")
    ['press', 'ctrl', '+', 'c', ',', '中', '文', '.']
    """
    return _WORD.findall(text.lower())
