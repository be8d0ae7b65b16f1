"""A translation memory as it stands: pairs whose keys are made when a sentence needs them."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from itertools import count
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.provenance import Provenance
from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair, StoredContext
from lightning_knnmt.knn.exact import Entries
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.metric import Metric
from lightning_knnmt.sentences.sparse import SparseSentences, bm25
from lightning_knnmt.sentences.words import words

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel

BATCH_TOKENS = 4096  # most tokens of a teacher-forced batch on either side, padding counted
MOST_UNRANKED = 1024  # pairs that are candidates for every sentence before BM25 ranks them too
POSITIONS = 1 << 20  # entry numbers of a pair, more than a model has positions


class PairMemory:
    """Sentence pairs of a translation memory, found by BM25 and edit distance (SK-MT, arXiv 2302.12188).

    No keys are stored: the few pairs that are like a sentence are teacher-forced for it. So a pair counts from the
    moment that it is added. Entry `number * POSITIONS + position` is a position in the target of a pair.

    Args:
        model: Makes the keys.
        pairs: The translation memory.

    >>> memory = PairMemory(load_model(tiny_model), [Pair("Öffnen", "Open"), Pair("Datei öffnen", "Open the file")])
    >>> memory.similar("Die Datei öffnen", 1)
    [1]
    >>> memory.add([Pair("Die Datei öffnen", "Open this file")])
    >>> memory.similar("Die Datei öffnen", 2)
    [2, 1]
    """

    nlist = None
    metric: Metric = "l2"  # of the keys of each sentence's own pairs

    def __init__(self, model: "KeyedModel", pairs: Iterable[Pair]) -> None:
        self.model = model
        self._pairs: list[Pair] = []
        self._words: list[tuple[int, ...]] = []  # [pair -> numbers of its source's words]
        self._numbers: dict[str, int] = {}  # [word -> number]
        self._ranked: SparseSentences | None = None
        self.add(pairs)

    @property
    def key_size(self) -> int:
        """D."""
        return self.model.key_size

    def __len__(self) -> int:
        """Pairs: their entries are made when they are needed."""
        return len(self._pairs)

    def check(self, model: "KeyedModel") -> None:
        """Refuse a model other than the one that makes the keys.

        Raises:
            ValueError: It is another.
        """
        if model is not self.model:
            raise ValueError(f"the memory makes keys with {self.model.name}, expected the model that translates")

    def add(self, pairs: Iterable[Pair]) -> None:
        """Learn some pairs, which count from the next sentence on."""
        for pair in self.model.split_pairs(pairs):
            self._pairs.append(pair)
            numbers = self._numbers
            self._words.append(tuple(numbers.setdefault(word, len(numbers)) for word in words(pair.src)))

    def keep(self, first: int) -> None:
        """Forget all pairs but the first so many.

        Raises:
            ValueError: There are fewer, or the number is negative.
        """
        if not 0 <= first <= len(self):
            raise ValueError(f"first is {first}, expected 0 to {len(self)}, the number of pairs")
        del self._pairs[first:], self._words[first:]
        if self._ranked is not None and len(self._ranked) > first:
            self._ranked = None

    def similar(self, source: str, sentences: int, candidates: int = 64) -> list[int]:
        """Numbers of the pairs whose sources are most like a text, best first.

        Pairs are ordered by 1 − edit distance / longer length, in words; candidates are the best by BM25, and the pairs
        that were added since BM25 last counted the words.

        Args:
            source: The text.
            sentences: How many, at most.
            candidates: Of BM25.

        Raises:
            ImportError: rapidfuzz or bm25s is not installed.
        """
        try:
            from rapidfuzz.distance.Levenshtein import normalized_similarity
        except ImportError as error:
            raise ImportError("the edit distance needs `pip install rapidfuzz`") from error
        check_at_least(1, sentences=sentences, candidates=candidates)
        ranked = self._by_words()
        strangers = count(-1, -1)  # words that no pair has differ from all of theirs
        unknown: dict[str, int] = {}
        asked = [self._numbers.get(word) for word in words(source)]
        spelled = [
            unknown.setdefault(word, next(strangers)) if number is None else number
            for word, number in zip(words(source), asked, strict=True)
        ]
        numbers = [*ranked.search([source], candidates)[0].tolist(), *range(len(ranked), len(self))]
        likeness = {number: normalized_similarity(self._words[number], spelled) for number in numbers}
        order = sorted(likeness, key=lambda number: (-likeness[number], number))
        return [number for number in order if likeness[number] > 0][:sentences]

    def _by_words(self) -> SparseSentences:
        if self._ranked is None or len(self) - len(self._ranked) > MOST_UNRANKED:
            self._ranked = bm25([pair.src for pair in self._pairs])
        return self._ranked

    @torch.no_grad()
    def encode(self, numbers: Sequence[int]) -> dict[int, Entries]:
        """Entries of some pairs by a teacher-forced pass, on the model's device.

        Args:
            numbers: Of the pairs, each once.
        """
        if not numbers:
            return {}
        pairs = [self._pairs[number] for number in numbers]
        ids = self.model.tokenize([pair.src for pair in pairs], [pair.tgt for pair in pairs])
        lengths = [max(len(src), len(tgt)) for src, tgt in zip(ids.src, ids.tgt, strict=True)]
        found = {}
        for places in token_budget_batches(lengths, BATCH_TOKENS):
            batch = collate([ids.src[n] for n in places], [ids.tgt[n] for n in places], self.model.pad_id)
            keys = self.model.keys(batch.to(self.model.device)).float()  # [B, T, D]
            for place, own in zip(places, keys, strict=True):
                values = torch.tensor(ids.tgt[place], device=own.device)
                first = numbers[place] * POSITIONS
                positions = torch.arange(first, first + len(values), device=own.device)
                found[numbers[place]] = Entries(own[: len(values)], values, positions)
        return found

    def search(
        self, queries: Tensor, k: int, nprobe: int = 8, rescore: int = 0, ef_search: int | None = None
    ) -> Neighbors:
        """There are no stored keys to search in.

        Raises:
            ValueError: Always.
        """
        raise ValueError(
            "a translation memory stores no keys, expected the retriever PerSentence, which makes keys of similar pairs"
        )

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the pairs and of the model that makes their keys: another after every pair that is added."""
        digest = hashlib.sha256(json.dumps(asdict(Provenance.of(self.model))).encode())
        for pair in self._pairs:
            digest.update(json.dumps([pair.src, pair.tgt, pair.document]).encode())
        return digest.hexdigest()

    def keys_of(self, ids: Tensor) -> Tensor:
        """Keys of some entries of shape (…), shape (…, D), made anew, on the ids' device; 0 where there is none."""
        keys = torch.zeros(ids.numel(), self.key_size)
        for rows, own, positions in self._by_pair(ids):
            keys[rows] = own.keys.cpu()[positions]
        return keys.view(*ids.shape, self.key_size).to(ids.device)

    def values_of(self, ids: Tensor) -> Tensor:
        """Target-token ids of some entries of shape (…), on their device; 0 where there is none."""
        values = torch.zeros(ids.numel(), dtype=torch.long)
        for rows, own, positions in self._by_pair(ids):
            values[rows] = own.values.cpu()[positions]
        return values.view(ids.shape).to(ids.device)

    def _by_pair(self, ids: Tensor) -> Iterator[tuple[Tensor, Entries, Tensor]]:
        """The rows of each pair that some entries are of, its entries, and their positions."""
        flat = ids.flatten().cpu()
        numbers = flat // POSITIONS
        for number, own in self.encode(numbers[flat >= 0].unique().tolist()).items():
            rows = (numbers == number).nonzero().flatten()
            yield rows, own, flat[rows] % POSITIONS

    def context(self, entry: int) -> StoredContext:
        """The sentence pair that an entry comes from, and its position.

        Raises:
            IndexError: There is no such pair.
        """
        number, position = divmod(entry, POSITIONS)
        if not 0 <= number < len(self):
            raise IndexError(f"entry is {entry}, expected one of {len(self)} pairs, each with {POSITIONS} numbers")
        return StoredContext(self._pairs[number], number, position)

    def sources(self) -> Iterator[str]:
        """The source text of every pair."""
        yield from (pair.src for pair in self._pairs)
