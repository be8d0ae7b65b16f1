"""The teacher-forced pass over the pairs of a shard."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from lightning_knnmt.backbone import Backbone, collate
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore.errors import DatastoreError
from lightning_knnmt.datastore.shard import KEY_DTYPE, ShardWriter

TOKENIZED_AT_ONCE = 1024  # pairs that are held beside those of a shard


@dataclass(frozen=True)
class Item:
    """A pair, its number in the corpus and its tokens."""

    number: int
    pair: Pair
    src: list[int]
    tgt: list[int]


def items_of_shards(backbone: Backbone, pairs: Iterator[tuple[int, Pair]], shard_entries: int) -> Iterator[list[Item]]:
    """Tokenize numbered pairs in their order and cut where a shard is full."""
    shard: list[Item] = []
    entries = 0
    for item in _items(backbone, pairs):
        if shard and entries + len(item.tgt) > shard_entries:
            yield shard
            shard, entries = [], 0
        shard.append(item)
        entries += len(item.tgt)
    if shard:
        yield shard


def _items(backbone: Backbone, pairs: Iterator[tuple[int, Pair]]) -> Iterator[Item]:
    while rows := list(islice(pairs, TOKENIZED_AT_ONCE)):
        sources, targets = backbone.tokenize([pair.src for _, pair in rows], [pair.tgt for _, pair in rows])
        for (number, pair), src, tgt in zip(rows, sources, targets, strict=True):
            yield Item(number, pair, src, tgt)
        del rows, sources, targets, pair


def write_shard(
    backbone: Backbone, items: list[Item], path: Path, max_tokens: int, progress: Callable[[int], object]
) -> None:
    """Encode the pairs of a shard in length-sorted batches, the longest first, and write them in that order."""
    lengths = [max(len(item.src), len(item.tgt)) for item in items]
    entries = sum(len(item.tgt) for item in items)
    with ShardWriter(path, entries, len(items), backbone.key_size) as writer, torch.inference_mode():
        for numbers in reversed(token_budget_batches(lengths, max_tokens)):
            rows = [items[number] for number in numbers]
            batch = collate([row.src for row in rows], [row.tgt for row in rows], backbone.pad_id).to(backbone.device)
            keys = backbone.keys(batch)[batch.target_mask].to(torch.float16)
            if not keys.isfinite().all():
                _refuse_infinite(keys, rows)
            values = np.fromiter((token for row in rows for token in row.tgt), np.int32, len(keys))
            writer.append(
                keys.cpu().numpy().astype(KEY_DTYPE, copy=False), values, [len(row.tgt) for row in rows],
                [row.pair for row in rows], [row.number for row in rows],
            )  # fmt: skip
            progress(len(rows))


def _refuse_infinite(keys: torch.Tensor, rows: list[Item]) -> None:
    entry = int((~keys.isfinite().all(1)).nonzero()[0])
    for row in rows:
        if entry < len(row.tgt):
            raise DatastoreError(
                f"a key of pair {row.number} ({row.pair.src[:60]!r}) is NaN or beyond fp16's range (65504); "
                "use the other key_type, or load the model with dtype: float32 if it overflows by itself"
            )
        entry -= len(row.tgt)
