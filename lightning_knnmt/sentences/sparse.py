"""Sentences as weighted words: BM25 and TF-IDF, computed by bm25s and scikit-learn."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.sentences.words import words


@dataclass(frozen=True)
class SparseSentences:
    """Weights of words in N sentences, in the order of the words.

    Attributes:
        vocabulary: [word -> its number].
        starts: Where the weights of each word begin, and their number, shape (words + 1,).
        sentences: The sentence of each weight, shape (weights,).
        weights: Shape (weights,).
        asked: What each word of a query counts, shape (words,).
        count: N.
    """

    vocabulary: dict[str, int]
    starts: NDArray[np.int64]
    sentences: NDArray[np.int32]
    weights: NDArray[np.float32]
    asked: NDArray[np.float32]
    count: int

    def __len__(self) -> int:
        return self.count

    def scores(self, text: str) -> NDArray[np.float32]:
        """How similar each sentence is to a text, shape (N,): the sum over the words that they have in common."""
        found = np.zeros(self.count, np.float32)
        for word, times in Counter(words(text)).items():
            if (number := self.vocabulary.get(word)) is not None:
                part = slice(self.starts[number], self.starts[number + 1])
                found[self.sentences[part]] += times * self.asked[number] * self.weights[part]
        return found

    def search(
        self, texts: Sequence[str], count: int, kept: NDArray[np.bool_] | None = None
    ) -> list[NDArray[np.int64]]:
        """Numbers of the sentences that are most like each of some texts, best first, none that shares no word with it.

        Args:
            texts: B texts.
            count: Sentences of each, at most.
            kept: Which sentences may be found, shape (N,); None: all.
        """
        found = map(self.scores, texts)
        return [best(scores if kept is None else scores * kept, count) for scores in found]


def best(scores: NDArray[np.float32], count: int) -> NDArray[np.int64]:
    """Numbers of the highest scores above 0, the highest first, of equal ones the earlier.

    >>> best(np.array([1, 0, 3, 1], np.float32), 2)
    array([2, 0])
    """
    chosen = np.flatnonzero(scores > 0)
    if count < len(chosen):
        least = np.partition(scores[chosen], len(chosen) - count)[len(chosen) - count]
        chosen = np.flatnonzero(scores >= least) if least > 0 else chosen
    return chosen[np.argsort(-scores[chosen], kind="stable")][:count]


def bm25(texts: Sequence[str]) -> SparseSentences:
    """Sentences by BM25 (Lucene's: k1 1.5, b 0.75).

    Args:
        texts: N sentences.

    Raises:
        ImportError: bm25s is not installed.

    >>> bm25(["Open the file.", "Close the door."]).search(["Which door?"], 2)
    [array([1])]
    """
    try:
        from bm25s import BM25
    except ImportError as error:
        raise ImportError("BM25 needs `pip install bm25s`") from error
    rows = [words(text) for text in texts]
    vocabulary = {word: number for number, word in enumerate(sorted({word for row in rows for word in row}))}
    asked = np.ones(len(vocabulary), np.float32)
    if not vocabulary:
        return _without_words(len(rows))
    made = BM25(method="lucene", k1=1.5, b=0.75)
    made.index(([[vocabulary[word] for word in row] for row in rows], dict(vocabulary)), show_progress=False)
    starts, sentences, weights = (made.scores[name] for name in ("indptr", "indices", "data"))
    starts = np.asarray(starts, np.int64)[: len(vocabulary) + 1]
    return SparseSentences(
        vocabulary, starts, np.asarray(sentences, np.int32), np.asarray(weights, np.float32), asked, len(rows)
    )


def tf_idf(texts: Sequence[str]) -> SparseSentences:
    """Sentences by TF-IDF, the cosine of the angle between a query and each (scikit-learn's, with smoothed IDF).

    Args:
        texts: N sentences.

    Raises:
        ImportError: scikit-learn is not installed.

    >>> tf_idf(["Open the file.", "Close the door."]).search(["Which door?"], 2)
    [array([1])]
    """
    try:
        from sklearn.feature_extraction.text import TfidfVectorizer
    except ImportError as error:
        raise ImportError("TF-IDF needs `pip install scikit-learn`") from error
    if not any(words(text) for text in texts):
        return _without_words(len(texts))
    vectorizer = TfidfVectorizer(analyzer=words, dtype=np.float32)
    columns = vectorizer.fit_transform(texts).tocsc()
    columns.sort_indices()
    vocabulary = {word: int(number) for word, number in sorted(vectorizer.vocabulary_.items())}
    return SparseSentences(
        vocabulary, columns.indptr.astype(np.int64), columns.indices.astype(np.int32), columns.data,
        vectorizer.idf_.astype(np.float32), len(texts),
    )  # fmt: skip


def _without_words(count: int) -> SparseSentences:
    nothing = np.empty(0, np.float32)
    return SparseSentences({}, np.zeros(1, np.int64), np.empty(0, np.int32), nothing, nothing, count)
