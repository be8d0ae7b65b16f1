"""What finds stored sentences that are like some texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class SentenceSearch(Protocol):
    """N stored sentences that can be searched by likeness."""

    def __len__(self) -> int: ...

    def search(
        self, texts: Sequence[str], count: int, kept: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """Numbers of the sentences that are most like each of some texts, best first.

        Args:
            texts: B texts.
            count: Sentences of each, at most.
            kept: Which sentences may be found, shape (N,); None: all.
        """
        ...


@dataclass(frozen=True)
class KeptSentences:
    """A search that leaves out sentences which were removed.

    Attributes:
        whole: The search with the removed sentences.
        kept: Which sentences may be found, shape (N,).
    """

    whole: SentenceSearch
    kept: NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.whole)

    def search(
        self, texts: Sequence[str], count: int, kept: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """As `SentenceSearch.search`, among the sentences that were not removed."""
        return self.whole.search(texts, count, self.kept if kept is None else self.kept & kept)
