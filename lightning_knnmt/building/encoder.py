"""The teacher-forced pass over the pairs of a shard."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.provenance import key_dtype
from lightning_knnmt.data.boxes import box_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.storage.errors import DatastoreError

T = TypeVar("T")
TOKENIZED_AT_ONCE = 1024  # pairs that are held beside those of a shard
UNWRITTEN = 2  # batches whose keys may wait for the thread that writes


@dataclass(frozen=True)
class Item:
    """A pair, its number in the corpus and its tokens."""

    number: int
    pair: Pair
    src: list[int]
    tgt: list[int]


class Tokenized:
    """Numbered pairs with their tokens, in their order, a block at a time.

    Args:
        model: Whose tokens.
        pairs: The pairs and their numbers in the corpus.

    Attributes:
        cut: Texts so far that were longer than the model's positions and were cut.
    """

    def __init__(self, model: KeyedModel, pairs: Iterable[tuple[int, Pair]]) -> None:
        self.model, self.pairs = model, iter(pairs)
        self.cut = 0

    def __iter__(self) -> Iterator[Item]:
        for rows in blocks_of(self.pairs, TOKENIZED_AT_ONCE):
            ids = self.model.tokenize([pair.src for _, pair in rows], [pair.tgt for _, pair in rows])
            self.cut += ids.cut
            for (number, pair), src, tgt in zip(rows, ids.src, ids.tgt, strict=True):
                yield Item(number, pair, src, tgt)
            del rows, ids, pair


def blocks_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """So many items at a time, in their order; a block is let go before the next one is made.

    >>> list(blocks_of("abcde", 2))
    [['a', 'b'], ['c', 'd'], ['e']]
    """
    items = iter(items)
    while block := list(islice(items, size)):
        yield block
        del block


def one_ahead(items: Iterator[T]) -> Generator[T, None, None]:
    """The items of an iterator, each of which is made in a thread while the one before it is in use."""
    end = object()
    with ThreadPoolExecutor(1, "ahead") as thread:
        following: Future[T | object] = thread.submit(next, items, end)
        while (item := following.result()) is not end:
            following = thread.submit(next, items, end)
            yield cast(T, item)
            del item  # or three would be in memory


def write_shard(
    model: KeyedModel,
    items: list[Item],
    path: Path,
    max_tokens: int,
    max_padding: float,
    progress: Callable[[int], object],
) -> None:
    """Encode the pairs of a shard in batches of similar lengths, the longest first, and write them in that order.

    A thread pads the next batch and another writes the last one, while the model runs. It alone waits for a GPU, where
    keys are copied from.
    """
    entries = sum(len(item.tgt) for item in items)
    dtype = key_dtype(model.config.key_type)
    batches = box_batches([len(item.src) for item in items], [len(item.tgt) for item in items], max_tokens, max_padding)
    padded = one_ahead(_padded([items[number] for number in numbers], model.pad_id) for numbers in batches)
    with (
        ShardWriter(path, entries, len(items), model.key_size, key_dtype=dtype) as writer,
        ThreadPoolExecutor(1, "write") as thread,
        closing(padded),
        torch.inference_mode(),
    ):
        unwritten: deque[Future[None]] = deque()
        for rows, batch, tokens in padded:
            keys = model.keys(batch.to(model.device, non_blocking=True)).flatten(0, 1)  # [B, T, D] -> [B * T, D]
            keys = keys[tokens.to(keys.device, non_blocking=True)].to(getattr(torch, dtype))
            unwritten.append(thread.submit(_write, writer, rows, keys, keys.isfinite().all()))
            if len(unwritten) > UNWRITTEN:
                unwritten.popleft().result()
            progress(len(rows))
        for written in unwritten:
            written.result()


def _padded(rows: list[Item], pad_id: int) -> tuple[list[Item], Batch, Tensor]:
    """A batch, and where its target tokens are, so that a GPU need not be waited for to know how many there are."""
    batch = collate([row.src for row in rows], [row.tgt for row in rows], pad_id)
    return rows, batch, batch.target_mask.flatten().nonzero().squeeze(1)


def _write(writer: ShardWriter, rows: list[Item], keys: Tensor, finite: Tensor) -> None:
    if not finite:
        _refuse_infinite(keys, rows)
    values = np.fromiter((token for row in rows for token in row.tgt), np.int32, len(keys))
    writer.append(
        keys.cpu().numpy(), values, [len(row.tgt) for row in rows],
        [row.pair for row in rows], [row.number for row in rows],
    )  # fmt: skip


def _refuse_infinite(keys: torch.Tensor, rows: list[Item]) -> None:
    entry = int((~keys.isfinite().all(1)).nonzero()[0])
    for row in rows:
        if entry < len(row.tgt):
            raise DatastoreError(
                f"a key of pair {row.number} ({row.pair.src[:60]!r}) is NaN or beyond fp16's range (65504); "
                "use the other key_type, or load the model with dtype: float32 if it overflows by itself"
            )
        entry -= len(row.tgt)
