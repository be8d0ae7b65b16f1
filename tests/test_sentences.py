"""Sentence search against plain loops."""

import math
from collections import Counter

import numpy as np
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from tiny_stores import corpus_pairs

from lightning_knnmt.sentences.sparse import bm25, tf_idf
from lightning_knnmt.sentences.words import words

TEXTS = [pair.src for pair in corpus_pairs(40)] + ["Datei Datei öffnen", "", "?!"]
QUERIES = ["Klicken Sie auf die Datei", "Datei , 7 Datei", "nothing of it", ""]


def bm25_loop(query: str, k1: float = 1.5, b: float = 0.75) -> list[float]:
    """Robertson's formula with Lucene's inverse document frequency."""
    rows = [Counter(words(text)) for text in TEXTS]
    mean = sum(map(len, map(words, TEXTS))) / len(TEXTS)
    scores = []
    for row in rows:
        score, length = 0.0, sum(row.values())
        for word in words(query):
            holders = sum(word in other for other in rows)
            idf = math.log(1 + (len(rows) - holders + 0.5) / (holders + 0.5))
            score += idf * row[word] / (row[word] + k1 * (1 - b + b * length / mean))
        scores.append(score)
    return scores


@pytest.mark.parametrize("query", QUERIES)
def test_bm25_is_the_formula(query: str) -> None:
    np.testing.assert_allclose(bm25(TEXTS).scores(query), bm25_loop(query), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("query", QUERIES)
def test_tf_idf_ranks_as_the_cosine_of_scikit_learn(query: str) -> None:
    vectorizer = TfidfVectorizer(analyzer=words)
    stored = vectorizer.fit_transform(TEXTS)
    cosines = (stored @ vectorizer.transform([query]).T).toarray()[:, 0]
    scores = tf_idf(TEXTS).scores(query)
    known = {word: times for word, times in Counter(words(query)).items() if word in vectorizer.vocabulary_}
    length = np.linalg.norm([times * vectorizer.idf_[vectorizer.vocabulary_[word]] for word, times in known.items()])
    np.testing.assert_allclose(scores, cosines * length, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [bm25, tf_idf])
@pytest.mark.parametrize("count", [1, 5, 100])
def test_search_gives_the_highest_scores_first_and_none_of_zero(make, count: int) -> None:
    made = make(TEXTS)
    for query, found in zip(QUERIES, made.search(QUERIES, count), strict=True):
        scores = made.scores(query)
        expected = sorted((number for number in range(len(TEXTS)) if scores[number] > 0), key=lambda n: (-scores[n], n))
        assert found.tolist() == expected[:count]


@pytest.mark.parametrize("make", [bm25, tf_idf])
@pytest.mark.parametrize("texts", [[], ["", " "]])
def test_texts_without_words_are_like_nothing(make, texts: list[str]) -> None:
    made = make(texts)
    assert len(made) == len(texts)
    assert [found.tolist() for found in made.search(["a", ""], 3)] == [[], []]
