"""From a parallel corpus to a datastore, in one teacher-forced pass."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lightning_knnmt.backbone import Backbone, collate
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, ReadReport, read_pairs
from lightning_knnmt.datastore.manifest import FILE_NAME, DatastoreError, Manifest, Provenance, ShardInfo, file_sha256
from lightning_knnmt.datastore.shard import KEY_DTYPE, ShardWriter

log = logging.getLogger(__name__)

TOKENIZED_AT_ONCE = 1024  # pairs that are held beside those of a shard


@dataclass(frozen=True)
class DatastoreConfig:
    """How a datastore is built.

    Attributes:
        folder: Where it goes.
        corpus: The parallel corpus; `train.jsonl` of `prepare_data.py`, or any format that the readers know.
        max_tokens: Most tokens of a batch on either side, padding counted.
        shard_entries: Most entries of a shard, if one pair has no more; the sentences of one shard are held in memory.
        overwrite: Replace a datastore that was built from something else; otherwise that is an error.
    """

    folder: Path
    corpus: CorpusFile
    max_tokens: int = 8192
    shard_entries: int = 1 << 20
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected 1 or more")
        if self.shard_entries < 1:
            raise ValueError(f"shard_entries is {self.shard_entries}, expected 1 or more")


@dataclass(frozen=True)
class _Item:
    number: int
    pair: Pair
    src: list[int]
    tgt: list[int]


def build_datastore(backbone: Backbone, config: DatastoreConfig) -> Manifest:
    """Write keys and values of every target token of a corpus.

    A datastore that is already there is kept if it is whole and the same model, tokenizer, key type and corpus would
    make it again. One that is replaced is gone from the moment encoding begins.

    Args:
        backbone: Whose states become the keys.
        config: Corpus, folder and sizes.

    Returns:
        The manifest of the whole datastore.

    Raises:
        DatastoreError: The folder holds a datastore that is damaged or made from something else, or a key is not
            finite in fp16.
    """
    folder = config.folder
    planned = Manifest(
        provenance=Provenance.of(backbone),
        corpus=config.corpus.path.name,
        corpus_sha256=_corpus_sha256(config.corpus),
        reading=_reading(config.corpus),
        shard_entries=config.shard_entries,
        shards=(),
    )
    if (folder / FILE_NAME).exists():
        try:
            existing = Manifest.load(folder)
            differences = _differences(existing, planned, folder)
        except DatastoreError as error:
            differences = [str(error)]
        if not differences:
            log.info("%s is already built from this model and corpus: %d entries", folder, existing.entries)
            return existing
        if not config.overwrite:
            raise DatastoreError(
                f"{folder} already holds another datastore: {'; '.join(differences)} "
                "(there against wanted). Choose another folder, or set overwrite: true to replace it."
            )
    total = sum(1 for _ in read_pairs(config.corpus))  # malformed input shows before anything is lost or begun
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).unlink(missing_ok=True)
    for stale in folder.glob("shard-*"):
        stale.unlink()

    report = ReadReport()
    shards: list[ShardInfo] = []
    with tqdm(total=total, desc=f"encode {config.corpus.path.name}", unit=" pairs") as progress:
        for items in _shards_of_items(backbone, read_pairs(config.corpus, report), config.shard_entries):
            path = folder / f"shard-{len(shards):05d}.h5"
            _write_shard(backbone, items, path, config.max_tokens, progress.update)
            entries = sum(len(item.tgt) for item in items)
            shards.append(ShardInfo(path.name, entries, len(items), file_sha256(path)))
            del items  # or two shards of pairs would be in memory while the next is read
    manifest = replace(planned, shards=tuple(shards))
    manifest.save(folder)
    log.info("%s: %s", config.corpus.path, report)
    log.info("%s: %d entries of %d pairs in %d shards", folder, manifest.entries, manifest.pairs, len(shards))
    return manifest


def _corpus_sha256(corpus: CorpusFile) -> str:
    sums = [file_sha256(path) for path in (corpus.path, corpus.tgt_path) if path is not None]
    return "+".join(sums)


def _reading(corpus: CorpusFile) -> dict[str, Any]:
    names = ("src_lang", "tgt_lang", "msgid_side", "malformed", "max_characters")
    return {"format": corpus.file_format, **{name: getattr(corpus, name) for name in names}}


def _differences(existing: Manifest, planned: Manifest, folder: Path) -> list[str]:
    differences = existing.provenance.differences(planned.provenance)
    if existing.corpus_sha256 != planned.corpus_sha256:
        differences.append(
            f"corpus {existing.corpus} ({existing.corpus_sha256[:12]}) "
            f"against {planned.corpus} ({planned.corpus_sha256[:12]})"
        )
    for name, wanted in planned.reading.items():
        if existing.reading.get(name) != wanted:
            differences.append(f"corpus.{name} {existing.reading.get(name)} against {wanted}")
    for shard in existing.shards:
        path = folder / shard.file
        if not path.exists() or file_sha256(path) != shard.sha256:
            differences.append(f"{shard.file} is missing or damaged")
    return differences


def _shards_of_items(backbone: Backbone, pairs: Iterator[Pair], shard_entries: int) -> Iterator[list[_Item]]:
    """Tokenize the corpus in the order of its pairs and cut it where a shard is full."""
    shard: list[_Item] = []
    entries = 0
    for item in _items(backbone, pairs):
        if shard and entries + len(item.tgt) > shard_entries:
            yield shard
            shard, entries = [], 0
        shard.append(item)
        entries += len(item.tgt)
    if shard:
        yield shard


def _items(backbone: Backbone, pairs: Iterator[Pair]) -> Iterator[_Item]:
    numbered = enumerate(pairs)
    while rows := list(islice(numbered, TOKENIZED_AT_ONCE)):
        sources, targets = backbone.tokenize([pair.src for _, pair in rows], [pair.tgt for _, pair in rows])
        for (number, pair), src, tgt in zip(rows, sources, targets, strict=True):
            yield _Item(number, pair, src, tgt)
        del rows, sources, targets, pair


def _write_shard(
    backbone: Backbone, items: list[_Item], path: Path, max_tokens: int, progress: Callable[[int], object]
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


def _refuse_infinite(keys: torch.Tensor, rows: list[_Item]) -> None:
    entry = int((~keys.isfinite().all(1)).nonzero()[0])
    for row in rows:
        if entry < len(row.tgt):
            raise DatastoreError(
                f"a key of pair {row.number} ({row.pair.src[:60]!r}) is NaN or beyond fp16's range (65504); "
                "use the other key_type, or load the model with dtype: float32 if it overflows by itself"
            )
        entry -= len(row.tgt)
