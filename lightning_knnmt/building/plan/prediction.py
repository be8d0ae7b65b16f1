"""From rates to a plan: arithmetic only."""

from dataclasses import dataclass

import numpy as np

from lightning_knnmt.building.config import DatastoreConfig
from lightning_knnmt.building.index import part_ranges
from lightning_knnmt.building.plan.encoding import EncodingRates
from lightning_knnmt.building.plan.indexing import POINTS_PER_LIST, IndexRates, kmeans_work
from lightning_knnmt.index.config import IndexConfig

REPORT_BYTES = 24  # of an entry, while the homogeneity of lists is computed: its list, its token, and pairs of these
LISTS_GROWTH = 1.5  # memory of lists that grow by doubling, over what is in them


@dataclass(frozen=True)
class Size:
    """What is to be built."""

    entries: int  # N
    pairs: int
    key_size: int  # D
    nlist: int | None  # lists of the index; None if it has none
    train_points: int
    datastore: DatastoreConfig
    index: IndexConfig  # with a factory other than `auto`
    machines: int = 1  # that share the work, and see the same folder

    @property
    def shards(self) -> list[int]:
        """Entries of each shard, if all pairs have as many."""
        starts = [*range(0, self.pairs, self.datastore.shard_pairs), self.pairs]
        return np.diff([start * self.entries // self.pairs for start in starts]).tolist()

    @property
    def parts(self) -> list[int]:
        """Entries of each part of the index; one part if it is built as a whole."""
        if self.index.layout == "whole" and self.nlist is None:
            return [self.entries]
        return [len(part) for part in part_ranges(self.shards, self.index.part_entries)]

    @property
    def merges(self) -> bool:
        """Whether parts of the index are merged in the end."""
        return len(self.parts) > 1 and self.index.layout == "whole"


@dataclass(frozen=True)
class Stage:
    """A stage of building."""

    name: str  # as in build.json
    seconds: float  # from its beginning to its end
    machine_seconds: float  # of all machines together, those that wait not counted


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk."""

    keys: float
    values: float
    texts: float  # and documents, lengths and numbers of pairs
    index: float
    temporary: float  # parts that are there until they are merged

    @property
    def total(self) -> float:
        """When everything is built."""
        return self.keys + self.values + self.texts + self.index


@dataclass(frozen=True)
class Memory:
    """Bytes in memory, of the machine that needs most."""

    baseline: float  # the process and its model
    encode: float  # beside it: batches, and texts and tokens of two shards
    train: float  # beside it: the sample, and what k-means copies of it
    index: float  # beside it: the index, and what adding, merging or reporting takes for a moment

    @property
    def peak(self) -> float:
        """The most at any time."""
        return self.baseline + max(self.encode, self.train, self.index)


@dataclass(frozen=True)
class Plan:
    """What building takes."""

    size: Size
    disk: Disk
    memory: Memory
    stages: tuple[Stage, ...]  # one after the other
    entries_error: float = 0.0  # standard error of the entries, as a share; 0 if they were counted or given

    @property
    def whole(self) -> Stage:
        """All stages as one."""
        seconds = sum(stage.seconds for stage in self.stages)
        return Stage("in all", seconds, sum(stage.machine_seconds for stage in self.stages))


def predict(size: Size, encoding: EncodingRates, index: IndexRates, entries_error: float = 0.0) -> Plan:
    """From rates to disk, memory and time."""
    filled = (index.list_bytes + index.array_bytes) * size.entries
    in_parts = index.empty_bytes * (1 + len(size.parts)) + filled
    disk = Disk(
        keys=2.0 * size.entries * size.key_size,
        values=4.0 * size.entries,
        texts=encoding.text_bytes * size.entries,
        index=in_parts if size.index.layout == "shards" else index.empty_bytes + filled,
        temporary=in_parts if size.merges else 0.0,
    )
    return Plan(size, disk, _memory(size, encoding, index), _stages(size, encoding, index, disk), entries_error)


def _stages(size: Size, encoding: EncodingRates, index: IndexRates, disk: Disk) -> tuple[Stage, ...]:
    """The time of each stage; a machine takes whole shards and whole parts, and the first one does the rest."""
    shards, parts = (_busiest(pieces, size.machines) for pieces in (size.shards, size.parts))
    read = encoding.read * size.entries  # everything by each machine
    encode = (encoding.encode + encoding.tokenize) * size.entries
    train = index.kmeans * kmeans_work(size.train_points, size.nlist, size.key_size) + index.codes
    add, write = index.add * size.entries, index.write * disk.index
    parted = index.write * disk.temporary if size.merges else write  # seconds to write what each machine writes
    stages = [
        Stage("encode", read + encode * shards, size.machines * read + encode),
        _alone("sample", index.sample * size.entries),
        _alone("train", train),
        Stage("add", add * parts, add),
        Stage("write", parted * parts + write * size.merges, parted + write * size.merges),
        _alone("merge", index.merge * disk.index),
        _alone("report", index.report * size.entries),
    ]
    return tuple(stage for stage in stages if stage.name != "merge" or size.merges)


def _alone(name: str, seconds: float) -> Stage:
    return Stage(name, seconds, seconds)


def _busiest(pieces: list[int], machines: int) -> float:
    """The share of the machine that has most if they take pieces in turn."""
    return max(sum(pieces[first::machines]) for first in range(machines)) / sum(pieces)


def _memory(size: Size, encoding: EncodingRates, index: IndexRates) -> Memory:
    def held(entries: int) -> float:
        return (LISTS_GROWTH * index.list_bytes + index.array_bytes) * entries

    part = max(size.parts)
    together = size.entries if size.index.layout == "whole" else part
    moments = [
        held(part) + 6 * size.key_size * min(size.index.chunk, part),  # adding keys in fp16 and fp32
        held(together) + (REPORT_BYTES if size.nlist else 4) * size.entries,
    ]
    if size.merges:
        moments.append(held(size.entries) + held(part) + index.empty_bytes)
    used = min(size.train_points, POINTS_PER_LIST * (size.nlist or size.train_points))
    copied = used if used < size.train_points else 0  # by k-means, if it leaves some out
    return Memory(
        encoding.baseline,
        encode=encoding.batches + encoding.held_bytes * sum(size.shards[:2]),
        train=4.0 * size.key_size * (size.train_points + copied),
        index=index.empty_bytes + max(moments),
    )
