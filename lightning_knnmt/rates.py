"""How fast and how large datastores and indexes become on this machine, measured on small ones."""

import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.backbone import Backbone, collate
from lightning_knnmt.cli import peak_memory_mb
from lightning_knnmt.data.boxes import box_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Datastore, DatastoreConfig, Manifest, Provenance, ShardInfo
from lightning_knnmt.datastore.encoder import Item, items_of, write_shard
from lightning_knnmt.datastore.files import file_sha256
from lightning_knnmt.datastore.manifest import shard_name
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.index import IndexConfig, IndexReport, build_index
from lightning_knnmt.timing import now

MIB = 1 << 20
TOKENIZED = 8  # pairs whose lengths are counted for each pair that is encoded
KEY_BYTES = 64 * MIB  # of the keys that the probed indexes hold
KMEANS_ITERATIONS = 10  # of FAISS for inverted lists
POINTS_PER_LIST = 256  # more are left out by FAISS's k-means
CODE_POINTS = 65536  # from which on training PQ, OPQ or SQ takes no longer, as FAISS uses no more
KMEANS_WORK = 5e10  # multiplications and additions of the larger probe of k-means
CODE_SECONDS = 10.0  # most time for training the codes of one probe


@dataclass(frozen=True)
class Line:
    """A quantity that grows evenly with another, neither part below 0.

    Attributes:
        start: At 0.
        slope: For each unit.
    """

    start: float
    slope: float

    def at(self, x: float) -> float:
        """The quantity at x."""
        return self.start + self.slope * x

    @classmethod
    def through(cls, *points: tuple[float, float]) -> "Line":
        """Through two measured points; where noise makes a part negative, it is 0 and the other fits the far point.

        >>> Line.through((1, 5), (3, 9))
        Line(start=3.0, slope=2.0)
        >>> Line.through((4, 8))
        Line(start=0.0, slope=2.0)
        """
        (x1, y1), (x2, y2) = min(points), max(points)
        if x1 == x2:
            return cls(0.0, y2 / x2) if x2 else cls(y2, 0.0)
        slope = max(0.0, (y2 - y1) / (x2 - x1))
        start = y2 - slope * x2
        return cls(start, slope) if start >= 0 else cls(0.0, y2 / x2)


@dataclass(frozen=True)
class CorpusSample:
    """A corpus, seen by a uniform sample of its pairs.

    Attributes:
        pairs: Pairs in the corpus.
        sample: Pairs drawn from it, in the order of the corpus.
        longest: A few pairs with the most characters, which need the most memory.
        read: Seconds to read a pair.
    """

    pairs: int
    sample: tuple[Pair, ...]
    longest: tuple[Pair, ...]
    read: float


@dataclass(frozen=True)
class EncodingRates:
    """What a pair and an entry cost.

    Attributes:
        entries: Entries of a pair.
        entries_error: Standard error of that.
        read: Seconds to read a pair once.
        tokenize: Seconds to tokenize a pair.
        encode: Seconds to encode an entry, write it and take the checksum.
        text_bytes: Bytes of a pair's texts, lengths and numbers on the disk.
        held_bytes: Bytes of a pair's texts and tokens in memory.
        baseline: Bytes of the process with its model.
        batches: Bytes that the largest batches take beside.
    """

    entries: float
    entries_error: float
    read: float
    tokenize: float
    encode: float
    text_bytes: float
    held_bytes: float
    baseline: float
    batches: float


@dataclass(frozen=True)
class IndexRates:
    """What an index over N entries of D dimensions with nlist lists costs.

    Attributes:
        sample: Seconds to read an entry while sampling.
        point: Seconds to keep one that is drawn.
        kmeans: Seconds of k-means over points × lists × D × iterations.
        codes: Seconds to train codes and transforms over their points.
        add: Seconds to add an entry over `effort`.
        write: Seconds to write a byte and take the checksum.
        merge: Seconds to merge a byte of a part.
        report: Seconds of everything after writing, for an entry.
        file_bytes: Bytes of an empty index without lists.
        list_bytes: Bytes of a list.
        entry_bytes: Bytes of an entry.
    """

    sample: float
    point: float
    kmeans: Line
    codes: Line
    add: Line
    write: float
    merge: float
    report: float
    file_bytes: float
    list_bytes: float
    entry_bytes: float


def with_lists(factory: str, nlist: int | None) -> str:
    """The same factory string with another number of lists.

    >>> with_lists("OPQ16,IVF4096_HNSW32,PQ16x4fs", 64)
    'OPQ16,IVF64_HNSW32,PQ16x4fs'
    """
    return factory if nlist is None else re.sub(r"IVF\d+", f"IVF{nlist}", factory)


def effort(factory: str, entries: int) -> float:
    """What the time to add an entry grows with: lists compared, or steps through a graph of lists or of entries.

    >>> effort("IVF1024,PQ64", 10**6), effort("IVF1024_HNSW32,PQ64", 10**6), effort("HNSW32", 2**20), effort("Flat", 9)
    (1024.0, 10.0, 20.0, 0.0)
    """
    if (lists := re.search(r"IVF(\d+)(_HNSW)?", factory)) is not None:
        return log2(int(lists[1])) if lists[2] else float(lists[1])
    return log2(entries) if "HNSW" in factory or "NSG" in factory else 0.0


def kmeans_work(points: int, nlist: int | None, key_size: int) -> float:
    """Points × lists × D × iterations of the k-means behind inverted lists."""
    if nlist is None:
        return 0.0
    return min(points, POINTS_PER_LIST * nlist) * nlist * key_size * KMEANS_ITERATIONS


def sample_corpus(corpus: CorpusFile, size: int, seed: int = 1, longest: int = 64) -> CorpusSample:
    """Read a corpus once, with memory for the sample only.

    Raises:
        ValueError: There are no pairs.
    """
    rng = np.random.default_rng(seed)
    sample: list[tuple[int, Pair]] = []
    long: list[tuple[int, int, Pair]] = []
    number = -1
    spent, start = 0.0, now()
    for number, pair in enumerate(read_pairs(corpus)):
        begun = now()
        if number < size:
            sample.append((number, pair))
        elif (place := int(rng.integers(number + 1))) < size:
            sample[place] = (number, pair)
        characters = len(pair.src) + len(pair.tgt)
        if len(long) < longest or characters > long[-1][0]:
            long = sorted([*long, (characters, number, pair)], key=lambda row: -row[0])[:longest]
        spent += now() - begun
    seconds = now() - start - spent
    if number < 0:
        raise ValueError(f"corpus {corpus.path} has no pairs, expected at least 1 to plan from")
    pairs = tuple(pair for _, pair in sorted(sample, key=lambda row: row[0]))
    return CorpusSample(number + 1, pairs, tuple(pair for *_, pair in long), seconds / (number + 1))


def measure_encoding(
    backbone: Backbone, corpus: CorpusSample, config: DatastoreConfig, pairs: int, folder: Path, seed: int = 1
) -> tuple[EncodingRates, Datastore]:
    """Encode some pairs with the code that builds datastores, after a warm-up with the largest batches.

    Batches are as full as those of a whole shard: they are made from all sampled pairs, and some of them are drawn.

    Args:
        backbone: The model.
        corpus: Its sample, larger than what is encoded.
        config: Sizes of batches.
        pairs: About how many pairs to encode.
        folder: Where the small datastore goes.
        seed: Of the draw.

    Returns:
        The rates, and the datastore, open.
    """
    baseline = _peak()
    long = list(items_of(backbone, enumerate(corpus.longest)))
    with torch.inference_mode():
        for item in (max(long, key=lambda item: len(item.src)), max(long, key=lambda item: len(item.tgt))):
            rows = max(1, config.max_tokens // max(len(item.src), len(item.tgt)))
            backbone.keys(collate([item.src] * rows, [item.tgt] * rows, backbone.pad_id).to(backbone.device))
    batches = _peak() - baseline
    start = now()
    items = list(items_of(backbone, enumerate(corpus.sample)))
    tokenize = (now() - start) / len(items)
    lengths = np.array([len(item.tgt) for item in items])
    chosen = _some_batches(items, config, pairs, seed)
    folder.mkdir()
    path = folder / shard_name(0)
    start = now()
    write_shard(backbone, chosen, path, config.max_tokens, config.max_padding, lambda _: None)
    sha256 = file_sha256(path)
    seconds = now() - start
    entries = sum(len(item.tgt) for item in chosen)
    shard = ShardInfo(path.name, entries, len(chosen), sha256)
    Manifest(Provenance.of(backbone), "a sample", sha256, {}, max(1, entries), (shard,)).save(folder)
    own = entries * (2 * backbone.key_size + 4)  # fp16 keys, and values
    characters = [sum(_text_bytes(item.pair) for item in rows) / len(rows) for rows in (items, chosen)]
    rest = (path.stat().st_size - own) / len(chosen) - characters[1]
    return EncodingRates(
        entries=float(lengths.mean()),
        entries_error=float(lengths.std() / len(lengths) ** 0.5) if len(items) < corpus.pairs else 0.0,
        read=corpus.read,
        tokenize=tokenize,
        encode=seconds / entries,
        text_bytes=characters[0] + rest,
        held_bytes=sum(map(_held, items)) / len(items),
        baseline=baseline,
        batches=batches,
    ), Datastore(folder)


def _some_batches(items: list[Item], config: DatastoreConfig, pairs: int, seed: int) -> list[Item]:
    src, tgt = ([len(getattr(item, side)) for item in items] for side in ("src", "tgt"))
    batches = box_batches(src, tgt, config.max_tokens, config.max_padding)
    chosen: list[int] = []
    for number in np.random.default_rng(seed).permutation(len(batches)):
        if len(chosen) >= pairs:
            break
        chosen += batches[number]
    return [items[number] for number in sorted(chosen)]


def _text_bytes(pair: Pair) -> int:
    return sum(len(text.encode()) for text in (pair.src, pair.tgt, pair.document))


def _held(item: Item) -> int:
    """Bytes of an item in memory: texts, lists and the numbers in them."""
    texts = sum(sys.getsizeof(text) for text in (item.pair.src, item.pair.tgt))
    tokens = sum(sys.getsizeof(side) + 32 * len(side) for side in (item.src, item.tgt))
    return texts + tokens + sys.getsizeof(item.pair) + sys.getsizeof(item) + sys.getsizeof(vars(item)) + 32


def measure_index(store: Datastore, config: IndexConfig, entries: int, nlist: int | None, points: int) -> IndexRates:
    """Train and fill small indexes with the code that builds them, over keys like those of a store.

    Args:
        store: A small one.
        config: The index that is planned, with its factory string.
        entries: N of the planned index.
        nlist: Its lists; None if it has none.
        points: Its training points.
    """
    folder, key_size = store.folder, store.key_size
    size = min(entries, max(4 * 8192, KEY_BYTES // (2 * key_size)))
    full = _repeated(store, folder / "full", size)
    half = _repeated(store, folder / "half", max(size // 2, min(size, 512)))
    few, many = None, None
    if nlist is not None:
        affordable = (KMEANS_WORK / (POINTS_PER_LIST * KMEANS_ITERATIONS * key_size)) ** 0.5
        many = max(1, min(nlist, len(half), 2 ** int(log2(max(1.0, affordable)))))
        few = max(1, many // 4)

    def build(on: Datastore, factory: str, train_points: int, parts: int = 1) -> _Probe:
        wanted = replace(
            config, factory=factory, train_points=min(train_points, len(on)), name="probe", overwrite=True,
            layout="whole", part_entries=max(1, len(on) // parts),
        )  # fmt: skip
        for file in on.folder.glob("probe*"):
            file.unlink()
        start = now()
        report = build_index(on, wanted)
        return _Probe(report, now() - start, (on.folder / "probe.faiss").stat().st_size)

    with full, half:
        kmeans = Line(0.0, 0.0)
        if few is not None and many is not None:
            probed = []
            for lists in (few, many):
                probe = build(half, f"IVF{lists},Flat", points)
                probed.append((kmeans_work(probe.points, lists, key_size), probe.of("train")))
            kmeans = Line.through(*probed)
        small = with_lists(config.factory, few)

        def codes_of(probe: _Probe) -> tuple[float, float]:
            own = probe.of("train") - kmeans.at(kmeans_work(probe.points, few, key_size))
            return min(probe.points, CODE_POINTS), max(0.0, own)

        enough = max(4096, few or 1)
        first = build(half, small, min(points, enough))
        longer = min(points, CODE_POINTS, int(enough * CODE_SECONDS / max(first.of("train"), 1e-3)))
        second = build(half, small, longer) if longer > enough else first
        whole = build(full, small, enough)
        wide = build(full, with_lists(config.factory, many), max(enough, many or 1))
        merge = 0.0
        if nlist is not None:
            merged = build(full, small, enough, parts=2)
            merge = merged.of("merge") / merged.bytes
    entry_bytes = (whole.bytes - first.bytes) / max(1, len(full) - len(half))
    list_bytes = 0.0
    if few is not None and many is not None and many > few:
        list_bytes = max(0.0, (wide.bytes - whole.bytes) / (many - few))
    pairs = [(probe.effort, probe.of("add") / probe.report.entries) for probe in (second, whole, wide)]
    near = max(pairs[:2], key=lambda pair: pair[0]) if few is None else pairs[1]
    drawn = second.points - first.points
    point = max(0.0, second.of("sample") - first.of("sample")) / drawn if drawn > 0 else 0.0
    add = Line.through(pairs[0] if few is None else near, pairs[2])
    return IndexRates(
        sample=wide.of("sample") / len(full),
        point=point,
        kmeans=kmeans,
        codes=Line.through(codes_of(first), codes_of(second)),
        add=add,
        write=wide.of("write") / wide.bytes,
        merge=merge,
        report=max(0.0, wide.seconds - sum(wide.report.seconds.values())) / len(full),
        file_bytes=max(0.0, whole.bytes - entry_bytes * len(full) - list_bytes * (few or 0)),
        list_bytes=list_bytes,
        entry_bytes=entry_bytes,
    )


@dataclass(frozen=True)
class _Probe:
    """A small index that was built.

    Attributes:
        report: What is said of it.
        seconds: Of the whole build.
        bytes: Size of its file.
    """

    report: IndexReport
    seconds: float
    bytes: int

    @property
    def points(self) -> int:
        """It was trained on."""
        return self.report.train_points

    @property
    def effort(self) -> float:
        """That adding an entry took."""
        return effort(self.report.factory, self.report.entries)

    def of(self, stage: str) -> float:
        """Seconds of a stage."""
        return self.report.seconds.get(stage, 0.0)


def _repeated(store: Datastore, folder: Path, entries: int) -> Datastore:
    """A datastore of so many keys: those of a store, over and over, each time with other noise; in two shards."""
    keys = np.concatenate(list(store.key_chunks()))
    rng, spread = np.random.default_rng(1), 0.1 * keys.astype(np.float32).std(0)
    folder.mkdir()
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(entries), min(2, entries))):
        noise = spread * rng.standard_normal((len(rows), store.key_size), np.float32)
        path = folder / shard_name(number)
        content: NDArray[np.float16] = (keys[rows % len(keys)] + noise).astype(np.float16)
        with ShardWriter(path, len(rows), 1, store.key_size) as writer:
            writer.append(content, store.values[rows % len(keys)], [len(rows)], [Pair("noise", "noise")], [number])
        shards.append(ShardInfo(path.name, len(rows), 1, file_sha256(path)))
    replace(store.manifest, shards=tuple(shards)).save(folder)
    return Datastore(folder)


@contextmanager
def scratch_folder(near: Path) -> Iterator[Path]:
    """A temporary folder on the disk where a datastore is to go, if one can write there."""
    place = next(parent for parent in near.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


@contextmanager
def silent() -> Iterator[None]:
    """Progress, log and FAISS's warnings of small samples go nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _peak() -> float:
    return float(MIB * (peak_memory_mb() or 0))
