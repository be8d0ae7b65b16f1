"""Tables of likely target tokens for vocabulary selection: the model's own, or learned from a translation memory."""

import io
import zipfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lightning_knnmt.backbone.firefox.shortlist import Shortlist
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding.candidates import Likely
from lightning_knnmt.storage.files import durable_file

OF_MODEL = "model"
_ARRAYS = ("frequent", "offsets", "targets")


def open_shortlist(model: KeyedModel, shortlist: str) -> Likely:
    """The table of a model's shortlist, or of a file.

    Args:
        model: The model.
        shortlist: `model`, or a .npz file that `save_shortlist` has written.

    Raises:
        ValueError: There is none, or it is damaged or of another vocabulary.
    """
    table = model.shortlist() if shortlist == OF_MODEL else load_shortlist(Path(shortlist))
    if table is None:
        raise ValueError(
            f"shortlist is {shortlist}, but {model.name} brings none; expected none, or a file with a learned table"
        )
    if len(table.targets) and int(table.targets.max()) >= model.vocabulary_size:
        raise ValueError(
            f"shortlist is {shortlist}, which has the token {table.targets.max()}, expected one below "
            f"{model.vocabulary_size}: learn it with the model's own tokenizer"
        )
    return Likely(table, model.vocabulary_size, model.shares_vocabulary)


def learn_shortlist(
    model: KeyedModel, pairs: Iterable[Pair], best: int = 50, frequent: int = 50, rounds: int = 3, block: int = 1024
) -> Shortlist:
    """Likely target tokens of each source token, from t(target | source) of IBM model 1.

    Args:
        model: Whose tokens are counted.
        pairs: A translation memory.
        best: Target tokens of each source token.
        frequent: Of the most frequent target tokens, so many are allowed with every source token of the memory.
        rounds: Of expectation and maximisation, after counts of what stands in the same pairs.
        block: Pairs that are tokenized at a time.
    """
    check_at_least(1, best=best, rounds=rounds, block=block)
    check_at_least(0, frequent=frequent)
    sentences: list[tuple[list[int], list[int]]] = []
    waiting: list[Pair] = []

    def take() -> None:
        ids = model.tokenize([pair.src for pair in waiting], [pair.tgt for pair in waiting])
        sentences.extend(zip(ids.src, ids.tgt, strict=True))
        waiting.clear()

    for pair in model.split_pairs(pairs):
        waiting.append(pair)
        if len(waiting) == block:
            take()
    if waiting:
        take()
    size = model.vocabulary_size
    likely = _translation_table(sentences, size, rounds)
    common = [token for token, _ in Counter(t for _, tgt in sentences for t in tgt).most_common(frequent)]
    lists = [sorted({*(likely[source][:best]), *common}) if source in likely else [] for source in range(size)]
    offsets = np.cumsum([0, *map(len, lists)]).astype(np.int64)
    return Shortlist(0, offsets, np.array([token for row in lists for token in row], np.int64))


def _translation_table(sentences: list[tuple[list[int], list[int]]], size: int, rounds: int) -> dict[int, list[int]]:
    """Target tokens of each source token, likeliest first."""
    if not sentences:
        return {}
    pairs = np.concatenate([np.repeat(src, len(tgt)) * size + np.tile(tgt, len(src)) for src, tgt in sentences])
    places = [(number, len(src), len(tgt)) for number, (src, tgt) in enumerate(sentences)]
    starts = np.cumsum([0, *(tgt for _, _, tgt in places)])
    word = np.concatenate([np.tile(np.arange(tgt) + starts[number], src) for number, src, tgt in places])
    cells, cell = np.unique(pairs, return_inverse=True)  # [co-occurrence -> cell of the table]
    source = cells // size
    table = np.ones(len(cells))
    for _ in range(rounds + 1):
        weight = table[cell]
        weight /= np.bincount(word, weight, minlength=starts[-1])[word]  # each target word's share among its sources
        counts = np.bincount(cell, weight, minlength=len(cells))
        table = counts / np.maximum(np.bincount(source, counts, minlength=size)[source], 1e-12)
    order = np.lexsort((-table, source))
    found: dict[int, list[int]] = {}
    for one, target in zip(source[order].tolist(), (cells[order] % size).tolist(), strict=True):
        found.setdefault(one, []).append(target)
    return found


def save_shortlist(table: Shortlist, path: Path) -> None:
    """Write a table as a .npz file, whole or not at all."""
    content = io.BytesIO()
    np.savez(content, frequent=np.int64(table.frequent), offsets=table.offsets, targets=table.targets)
    with durable_file(path) as file:
        file.write(content.getvalue())


def load_shortlist(path: Path) -> Shortlist:
    """Read a table that `save_shortlist` has written.

    Raises:
        ValueError: It is no such file, or damaged.
    """
    if not path.is_file():
        raise ValueError(f"shortlist is {path}, which is no file, expected `model` or a .npz file")
    try:
        with np.load(path, allow_pickle=False) as content:
            frequent, offsets, targets = (content[name] for name in _ARRAYS)
            whole = all(array.dtype.kind == "i" for array in (frequent, offsets, targets))
            whole = whole and offsets[0] == 0 and offsets[-1] == len(targets) and bool((np.diff(offsets) >= 0).all())
            if not (whole and int(frequent) >= 0 and (targets >= 0).all()):
                raise ValueError("its offsets or tokens do not fit")
    except (OSError, ValueError, KeyError, IndexError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"shortlist is {path}, which is damaged or no shortlist: {error}") from error
    return Shortlist(int(frequent), offsets.astype(np.int64), targets.astype(np.int64))
