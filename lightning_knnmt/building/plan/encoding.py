"""What encoding costs, measured on a sample of the corpus with the code that builds datastores."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.config import DatastoreConfig
from lightning_knnmt.building.encoder import Tokenized, write_shard
from lightning_knnmt.data.boxes import box_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Manifest, Provenance, ShardInfo
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import shard_file
from lightning_knnmt.timing import now, peak_memory_mb

TOKENIZED_PER_ENCODED = 8  # pairs of the sample for each one that is encoded
BYTES_PER_TOKEN = 55  # in memory, of either side: its number, and its share of the pair and its texts


@dataclass(frozen=True)
class EncodingRates:
    """What encoding takes; seconds and bytes of an entry, but for what stands in memory all the time."""

    pairs: int  # of the corpus
    entries: float  # of a pair
    entries_error: float  # standard error of that, as a share; 0 if all pairs were counted
    read: float  # seconds to read its share of the corpus once
    tokenize: float  # seconds to tokenize that
    encode: float  # seconds to encode it, write it and take the checksum
    text_bytes: float  # of its share of texts, lengths and numbers on the disk
    held_bytes: float  # of its share of texts and tokens in memory
    baseline: float  # bytes of the process with its model
    batches: float  # bytes that batches take beside
    cut: int = 0  # texts of the sample that were longer than the model's positions


def measure_encoding(model: KeyedModel, config: DatastoreConfig, pairs: int, folder: Path) -> EncodingRates:
    """Encode some pairs of a corpus with the code that builds datastores, after the longest batch as a warm-up.

    Batches are as full as those of a whole shard: they are made from several times as many pairs, and every so many-th
    of them, from the longest to the shortest, is encoded. Their time is taken by tokens of both sides, of which they
    may have more or fewer for an entry than the corpus.

    Args:
        model: The model.
        config: The corpus, and sizes of batches.
        pairs: About how many pairs to encode.
        folder: Where the small datastore of these pairs is left.

    Raises:
        ValueError: The corpus has no pairs.
    """
    baseline = _peak()
    start = now()
    total, sample = sample_pairs(model, config.corpus, TOKENIZED_PER_ENCODED * pairs)
    read = (now() - start) / total
    start = now()
    tokenized = Tokenized(model, enumerate(sample))
    items = list(tokenized)
    tokenize = now() - start
    src, tgt = (np.array([len(getattr(item, side)) for item in items]) for side in ("src", "tgt"))
    batches = box_batches(src.tolist(), tgt.tolist(), config.max_tokens, config.max_padding)
    step = max(1, round(len(items) / pairs))

    def encode(chosen: list[list[int]], name: str) -> tuple[ShardInfo, NDArray[np.int64], float]:
        rows = np.sort(np.concatenate(chosen))
        start = now()
        write_shard(
            model, [items[row] for row in rows], folder / name, config.max_tokens, config.max_padding, lambda _: None
        )
        shard = ShardInfo(name, int(tgt[rows].sum()), len(rows), file_sha256(folder / name))
        return shard, rows, now() - start

    encode(batches[:1], "warm-up.h5")
    shard, rows, seconds = encode(batches[min(step // 2, len(batches) - 1) :: step], shard_file(0))
    Manifest(Provenance.of(model), "a sample", shard.sha256, {}, None, (shard,)).save(folder)
    numbers = shard.entries * (2 * model.key_size + 4)  # bytes of fp16 keys, and values
    tokens = float((src + tgt).sum() / tgt.sum())  # of both sides for each entry
    return EncodingRates(
        pairs=total,
        entries=float(tgt.mean()),
        entries_error=float(tgt.std() / tgt.mean() / len(tgt) ** 0.5) if len(items) < total else 0.0,
        read=float(read / tgt.mean()),
        tokenize=float(tokenize / tgt.sum()),
        encode=tokens * seconds / float((src + tgt)[rows].sum()),
        text_bytes=((folder / shard.file).stat().st_size - numbers) / shard.entries,
        held_bytes=tokens * BYTES_PER_TOKEN,
        baseline=baseline,
        batches=_peak() - baseline,
        cut=tokenized.cut,
    )


def sample_pairs(model: KeyedModel, corpus: CorpusFile, size: int, seed: int = 1) -> tuple[int, list[Pair]]:
    """How many pairs a corpus has, and a uniform sample of them in its order; it alone is held in memory.

    Raises:
        ValueError: There are no pairs.
    """
    rng = np.random.default_rng(seed)
    sample: list[tuple[int, Pair]] = []
    number = -1
    for number, pair in enumerate(model.split_pairs(read_pairs(corpus))):
        if number < size:
            sample.append((number, pair))
        elif (place := int(rng.integers(number + 1))) < size:
            sample[place] = (number, pair)
    if number < 0:
        raise ValueError(f"corpus {corpus.path} has no pairs, expected at least 1 to plan from")
    return number + 1, [pair for _, pair in sorted(sample, key=lambda row: row[0])]


def _peak() -> float:
    return float((peak_memory_mb() or 0) << 20)
