"""What an index costs, measured on small ones over keys like those of a sample, with the code that builds indexes."""

import re
from dataclasses import dataclass, replace
from math import log2
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore, ShardInfo
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.factory import make_index
from lightning_knnmt.index.faiss_index import write_index
from lightning_knnmt.index.layers import find_ivf
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import shard_file
from lightning_knnmt.timing import now

MEASURED_KEYS = 3 << 16  # of the small indexes, if as many are planned: chunks enough for arrays to grow twice
CODE_POINTS = 65536  # from which on training PQ, OPQ or SQ takes no longer, as FAISS uses no more
KMEANS_ITERATIONS = 10  # of FAISS for inverted lists
POINTS_PER_LIST = 256  # more are left out by FAISS's k-means
MEASURED_MULTIPLICATIONS = 4e11  # of the largest k-means that is run, and of finding the lists of keys


@dataclass(frozen=True)
class IndexRates:
    """What an index takes."""

    sample: float  # seconds to read an entry while sampling
    kmeans: float  # seconds of k-means over `kmeans_work`
    codes: float  # seconds to train everything else: codes and transforms
    add: float  # seconds to add an entry
    write: float  # seconds to write a byte and take the checksum
    merge: float  # seconds to merge a byte of a part
    report: float  # seconds of everything after writing, for an entry
    empty_bytes: float  # of the index without entries
    list_bytes: float  # of an entry in its list
    array_bytes: float  # of an entry outside lists, in arrays of all entries


def measure_index(store: Datastore, config: IndexConfig, entries: int) -> IndexRates:
    """Build the index over few entries with as many of its lists as k-means finds in seconds, and again with few lists.

    The first says what an entry costs, both together what k-means and what codes cost to train. If more lists are
    planned, what finding an entry's list among so many costs more is measured with random centroids.

    Args:
        store: A small one, with whose keys to measure.
        config: The index that is planned, with its factory string and training points.
        entries: N of the planned index.
    """
    factory, key_size = config.factory, store.key_size
    index = make_index(factory, key_size, config.metric)
    nlist = None if (ivf := find_ivf(index)) is None else int(ivf.nlist)
    size = min(entries, MEASURED_KEYS)
    points = min(config.train_points or size, CODE_POINTS, size)
    lists = None if nlist is None else _affordable(nlist, points, key_size)
    parts = 2 if entries > config.part_entries else 1
    config = replace(config, train_points=points, part_entries=-(-size // parts))
    few = None if lists is None else max(1, lists // 16)
    with _noisy(store, size) as keys:
        most = _build(keys, replace(config, factory=with_lists(factory, lists), name="most"))
        least = most if few == lists else _build(keys, replace(config, factory=with_lists(factory, few), name="least"))
        sample = keys.sample_keys(CODE_POINTS)
    kmeans, codes = training_rates(
        (kmeans_work(points, few, key_size), least.seconds["train"]),
        (kmeans_work(points, lists, key_size), most.seconds["train"]),
    )
    _, least_empty = _unfilled(with_lists(factory, few), sample, store.folder, config.metric)
    find, empty = _unfilled(with_lists(factory, lists), sample, store.folder, config.metric)
    find_all, empty = (find, empty) if lists == nlist else _unfilled(factory, sample, store.folder, config.metric)
    add = most.seconds["add"] / size + max(0.0, find_all - find)
    if nlist is None and "HNSW" in factory:
        add *= log2(max(2, entries)) / log2(max(2, size))  # steps through a graph of entries
    entry_bytes = (least.bytes - least.files * least_empty) / size  # more lists are padded more, the fewer are in each
    array_bytes = entry_bytes if ivf is None else float(index.sa_code_size() - ivf.sa_code_size())
    return IndexRates(
        sample=most.seconds["sample"] / size,
        kmeans=kmeans,
        codes=codes,
        add=add,
        write=most.seconds["write"] / most.bytes / (2 if "merge" in most.seconds else 1),
        merge=most.seconds.get("merge", 0.0) / most.bytes,
        report=most.rest / size,
        empty_bytes=empty,
        list_bytes=entry_bytes - array_bytes,
        array_bytes=array_bytes,
    )


@dataclass(frozen=True)
class _Probe:
    """A small index that was built."""

    seconds: dict[str, float]  # of each stage
    rest: float  # seconds beside them
    files: int
    bytes: int


def _build(keys: Datastore, config: IndexConfig) -> _Probe:
    start = now()
    seconds = build_index(keys, config).seconds
    rest = max(0.0, now() - start - sum(seconds.values()))
    sizes = [file.stat().st_size for file in keys.folder.glob(f"{config.name}*.faiss")]
    return _Probe(seconds, rest, len(sizes), sum(sizes))


def kmeans_work(points: int, nlist: int | None, key_size: int) -> float:
    """Points × lists × D × iterations of the k-means behind inverted lists; 0 without lists."""
    lists = nlist or 0
    return float(min(points, POINTS_PER_LIST * lists) * lists * key_size * KMEANS_ITERATIONS)


def training_rates(small: tuple[float, float], large: tuple[float, float]) -> tuple[float, float]:
    """Seconds for each unit of k-means, and seconds beside it, from work and seconds of two trainings: the line through
    both, or, where noise makes a part of it negative, one through the larger training.

    >>> training_rates((10.0, 3.0), (30.0, 5.0))
    (0.1, 2.0)
    """
    if large[0] <= small[0]:
        return 0.0, large[1]
    slope = min(max(0.0, (large[1] - small[1]) / (large[0] - small[0])), large[1] / large[0])
    return slope, large[1] - slope * large[0]


def with_lists(factory: str, nlist: int | None) -> str:
    """The same factory string with another number of lists.

    >>> with_lists("OPQ16,IVF4096_HNSW32,PQ16x4fs", 64)
    'OPQ16,IVF64_HNSW32,PQ16x4fs'
    """
    return factory if nlist is None else re.sub(r"IVF\d+", f"IVF{nlist}", factory)


def _affordable(nlist: int, points: int, key_size: int) -> int:
    """As many of the lists as k-means finds within the measured work, at least one: a power of two if not all."""
    if kmeans_work(points, nlist, key_size) <= MEASURED_MULTIPLICATIONS:
        return nlist
    return max(1, 2 ** int(log2(MEASURED_MULTIPLICATIONS / (points * key_size * KMEANS_ITERATIONS))))


def _unfilled(factory: str, keys: NDArray[np.float32], folder: Path, metric: Metric) -> tuple[float, int]:
    """Seconds to find a key's list among random centroids (0 without lists), and bytes of the index without entries."""
    index = make_index(factory, keys.shape[1], metric)
    seconds = 0.0
    if (ivf := find_ivf(index)) is not None:
        rows = np.random.default_rng(1).choice(len(keys), ivf.nlist, replace=ivf.nlist > len(keys))
        keys = np.pad(keys, ((0, 0), (0, max(0, ivf.d - keys.shape[1]))))[:, : ivf.d]  # after transforms: other sizes
        ivf.quantizer.train(keys[rows])
        ivf.quantizer.add(keys[rows])
        keys = np.ascontiguousarray(keys[: max(1024, int(MEASURED_MULTIPLICATIONS / (ivf.nlist * ivf.d)))])
        start = now()
        ivf.quantizer.search(keys, 1)
        seconds = (now() - start) / len(keys)
    write_index(index, folder / "unfilled.faiss")
    return seconds, (folder / "unfilled.faiss").stat().st_size


def _noisy(store: Datastore, entries: int) -> Datastore:
    """A datastore of so many keys: those of a store, over and over, each time with other noise; in two shards."""
    keys = np.concatenate(list(store.key_chunks()))
    rng, spread = np.random.default_rng(1), 0.1 * keys.astype(np.float32).std(0)
    folder = store.folder / "noisy"
    folder.mkdir()
    shards = []
    for number, rows in enumerate(np.array_split(np.arange(entries), min(2, entries))):
        path = folder / shard_file(number)
        with ShardWriter(path, len(rows), 1, store.key_size) as writer:
            noise = spread * rng.standard_normal((len(rows), store.key_size), np.float32)
            content: NDArray[np.float16] = (keys[rows % len(keys)] + noise).astype(np.float16)
            writer.append(content, store.values[rows % len(keys)], [len(rows)], [Pair("noise", "noise")], [number])
        shards.append(ShardInfo(path.name, len(rows), 1, file_sha256(path)))
    replace(store.manifest, shards=tuple(shards)).save(folder)
    return Datastore(folder)
