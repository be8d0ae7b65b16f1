"""What building a datastore and its index will take: disk, memory and time, from rates measured on this machine."""

import logging
import sys
from dataclasses import dataclass, replace
from math import ceil

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.cli import log_cut
from lightning_knnmt.datastore import DatastoreConfig
from lightning_knnmt.datastore.ranks import Processes
from lightning_knnmt.index import IndexConfig, choose_factory
from lightning_knnmt.index.factory import check_sample, default_train_points, make_index
from lightning_knnmt.index.layers import find_ivf
from lightning_knnmt.index.parts import part_ranges
from lightning_knnmt.rates import (
    CODE_POINTS,
    TOKENIZED,
    EncodingRates,
    IndexRates,
    effort,
    kmeans_work,
    measure_encoding,
    measure_index,
    sample_corpus,
    scratch_folder,
    silent,
)

log = logging.getLogger(__name__)

SAMPLING_BLOCK = 65536  # keys that are read at a time while they are sampled
REPORT_BYTES = 56  # of an entry, while the homogeneity of lists is computed: its list, its token, and both sorted
LISTS_GROWTH = 1.5  # memory of lists that grow by doubling, over what is in them


@dataclass(frozen=True)
class Size:
    """What is to be built.

    Attributes:
        entries: N.
        pairs: Sentence pairs.
        key_size: D.
        shard_entries: Most entries of a shard.
        factory: Of the index, not `auto`.
        nlist: Its lists; None if it has none.
        train_points: Keys that it is trained on.
        contiguous_bytes: Bytes of an entry that are not in lists but in an array of all entries.
        part_entries: Least entries of a part.
        in_shards: Whether the index stays in parts.
        chunk: Keys added at a time.
        machines: That share the work; they see the same folder.
    """

    entries: int
    pairs: int
    key_size: int
    shard_entries: int
    factory: str
    nlist: int | None
    train_points: int
    contiguous_bytes: float = 0.0
    part_entries: int = 1 << 24
    in_shards: bool = False
    chunk: int = 65536
    machines: int = 1

    def __post_init__(self) -> None:
        for name in ("entries", "pairs", "machines"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")

    @property
    def shards(self) -> list[int]:
        """Entries of each shard."""
        number = ceil(self.entries / self.shard_entries)
        return [min(self.shard_entries, self.entries - shard * self.shard_entries) for shard in range(number)]

    @property
    def parts(self) -> list[int]:
        """Entries of each part of the index; one part if it is built as a whole."""
        if not self.in_shards and self.nlist is None:
            return [self.entries]
        return [len(part) for part in part_ranges(self.shards, self.part_entries)]


@dataclass(frozen=True)
class Stage:
    """A stage of building.

    Attributes:
        name: As in build.json.
        seconds: From its beginning to its end.
        machine_seconds: Of all machines together, those that wait not counted.
    """

    name: str
    seconds: float
    machine_seconds: float


@dataclass(frozen=True)
class Disk:
    """Bytes on the disk.

    Attributes:
        keys: fp16.
        values: Target tokens.
        texts: Both sides, documents, lengths and numbers.
        index: All files of the index.
        temporary: Parts that are there until they are merged.
    """

    keys: float
    values: float
    texts: float
    index: float
    temporary: float

    @property
    def total(self) -> float:
        """When everything is built."""
        return self.keys + self.values + self.texts + self.index


@dataclass(frozen=True)
class Memory:
    """Bytes in memory, of the machine that needs most.

    Attributes:
        baseline: The process and its model.
        encode: Beside it while encoding: the largest batches, texts and tokens of two shards.
        sample: Beside it while training: the sample, and what k-means copies of it.
        index: Beside it while adding, merging and reporting: the index itself and what its growth takes for a moment.
    """

    baseline: float
    encode: float
    sample: float
    index: float

    @property
    def peak(self) -> float:
        """The most at any time."""
        return self.baseline + max(self.encode, self.sample, self.index)


@dataclass(frozen=True)
class Plan:
    """What building takes.

    Attributes:
        size: What is built.
        disk: Bytes on the disk.
        memory: Bytes in memory.
        stages: In order; they follow one another.
        entries_error: Standard error of the entries, as a share; 0 if they were counted or given.
    """

    size: Size
    disk: Disk
    memory: Memory
    stages: tuple[Stage, ...]
    entries_error: float = 0.0

    @property
    def seconds(self) -> float:
        """From beginning to end."""
        return sum(stage.seconds for stage in self.stages)

    def to_text(self) -> str:
        """A report for reading."""
        size, disk, memory = self.size, self.disk, self.memory
        error = f" (± {200 * self.entries_error:.1f} %)" if self.entries_error else ""
        lists = "no lists" if size.nlist is None else f"{size.nlist:,} lists"
        parts = f", {len(size.parts)} parts" if len(size.parts) > 1 else ""
        rows = [
            ("entries", f"{size.entries:,}{error} of {size.pairs:,} pairs, {size.key_size} dimensions"),
            ("shards", f"{len(size.shards):,}"),
            ("index", f"{size.factory}: {lists}, {size.train_points:,} training points{parts}"),
            ("disk", f"{_bytes(disk.total)}: keys {_bytes(disk.keys)}, values {_bytes(disk.values)}, "
                     f"texts {_bytes(disk.texts)}, index {_bytes(disk.index)}"),
        ]  # fmt: skip
        if disk.temporary:
            rows.append(("", f"and {_bytes(disk.temporary)} until the parts of the index are merged"))
        rows += [
            ("peak memory", f"{_bytes(memory.peak)}: process and model {_bytes(memory.baseline)}, beside it"),
            ("", f"encoding {_bytes(memory.encode)}, training {_bytes(memory.sample)}, index {_bytes(memory.index)}"),
        ]
        rows += [(stage.name, self._time(stage.seconds, stage.machine_seconds)) for stage in self.stages]
        rows.append(("in all", self._time(self.seconds, sum(stage.machine_seconds for stage in self.stages))))
        if size.machines > 1:
            rows.append(("machines", f"{size.machines}; sampling, training, merging and writing are done by the first"))
            rows.append(("", f"each writes about {_bytes((disk.total - disk.index) / size.machines)} of shards"))
        rows.append(
            ("uncertain", "times by about 20 %, more where the machine is busy, or an index is extrapolated far")
        )
        return "\n".join(f"{name:<12}{text}" for name, text in rows)

    def _time(self, seconds: float, machine_seconds: float) -> str:
        together = f" ({_duration(machine_seconds)} of all machines)" if self.size.machines > 1 else ""
        return f"{_duration(seconds)}{together}"


def predict(size: Size, encoding: EncodingRates, index: IndexRates) -> Plan:
    """From rates to disk, memory and time.

    Args:
        size: What is to be built.
        encoding: Rates of encoding.
        index: Rates of the index.
    """
    file, filled = index.file_bytes + index.list_bytes * (size.nlist or 0), index.entry_bytes * size.entries
    several = len(size.parts) > 1
    in_parts = file * (1 + len(size.parts)) + filled
    disk = Disk(
        keys=2.0 * size.entries * size.key_size,
        values=4.0 * size.entries,
        texts=encoding.text_bytes * size.pairs,
        index=in_parts if size.in_shards else file + filled,
        temporary=in_parts if several and not size.in_shards else 0.0,
    )
    stages = _stages(size, encoding, index, disk.index)
    return Plan(size, disk, _memory(size, encoding, file, index.entry_bytes), stages)


def _stages(size: Size, encoding: EncodingRates, index: IndexRates, index_bytes: float) -> tuple[Stage, ...]:
    """The time of each stage; a machine takes whole shards and whole parts, and the first one does the rest."""
    shards, parts, machines = size.shards, size.parts, size.machines
    tokenize = encoding.tokenize * (1 if machines == 1 else 2) * size.pairs  # several first find where shards begin
    read = 2 * encoding.read * size.pairs  # each reads everything
    encode = encoding.encode * size.entries + tokenize
    busiest = _busiest(shards, machines) / size.entries
    each = index.add.at(effort(size.factory, size.entries))
    training = index.kmeans.at(kmeans_work(size.train_points, size.nlist, size.key_size)) + index.codes.at(
        min(size.train_points, CODE_POINTS)
    )
    own_parts = _busiest(parts, machines) if len(parts) > 1 or size.in_shards else size.entries
    whole = [
        Stage("encode", read + encode * busiest, machines * read + encode),
        *_alone("sample", index.sample * size.entries + index.point * size.train_points),
        *_alone("train", training),
        Stage("add", each * own_parts, each * size.entries),
        *_alone("write", index.write * index_bytes * (2 if len(parts) > 1 and not size.in_shards else 1)),
    ]
    if len(parts) > 1 and not size.in_shards:
        whole += _alone("merge", index.merge * index_bytes)
    return (*whole, *_alone("report", index.report * size.entries))


def _alone(name: str, seconds: float) -> list[Stage]:
    return [Stage(name, seconds, seconds)]


def _memory(size: Size, encoding: EncodingRates, file_bytes: float, entry_bytes: float) -> Memory:
    shards = size.shards
    held = encoding.held_bytes * size.pairs / size.entries * sum(shards[:2])
    points = size.train_points
    copied = 0 if size.nlist is None or points <= 256 * size.nlist else 256 * size.nlist
    choosing = 8 * size.entries if 50 * points > size.entries else 0  # numpy shuffles all numbers, or draws few
    block = min(SAMPLING_BLOCK, max(shards)) * 2 * size.key_size
    sample = 4 * size.key_size * points + max(choosing + block, 4 * size.key_size * copied)
    parts = size.parts
    adding = max(parts)
    chunk = 6 * size.key_size * min(size.chunk, adding)  # fp16 and fp32
    listed = entry_bytes - size.contiguous_bytes
    growing = size.contiguous_bytes * growth(adding, size.chunk) + listed * LISTS_GROWTH * adding
    report = REPORT_BYTES * size.entries if size.nlist is not None else 4 * size.entries
    added = adding if size.in_shards else size.entries
    held_index = size.contiguous_bytes * added + listed * LISTS_GROWTH * added
    index = file_bytes + max(growing + chunk, held_index + report)
    if len(parts) > 1 and not size.in_shards:
        merging = size.contiguous_bytes * growth(size.entries, adding) + listed * LISTS_GROWTH * size.entries
        index = max(index, 2 * file_bytes + merging + entry_bytes * adding)
    return Memory(encoding.baseline, encoding.batches + held, sample, index)


def growth(entries: int, chunk: int) -> int:
    """Most entries in memory while an array grows to N of them by `chunk`: a full one is copied to one twice as large.

    >>> growth(700, 100), growth(900, 100), growth(100, 100)
    (800, 1600, 100)
    """
    capacity = size = most = min(chunk, entries)
    while size < entries:
        added = min(chunk, entries - size)
        if size + added > capacity:
            capacity = size + max(size, added)
            most = max(most, 2 * size)
        size += added
    return max(most, entries)


def _busiest(pieces: list[int], machines: int) -> int:
    """The most that one machine has if they take pieces in turn."""
    return max(sum(pieces[first::machines]) for first in range(machines))


def make_plan(
    backbone: Backbone,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    entries: int | None = None,
    machines: int = 1,
    sample_pairs: int = 2000,
) -> Plan:
    """Measure rates, and predict from them; arguments and errors as those of `plan`."""
    for name, value in (("entries", entries), ("machines", machines), ("sample_pairs", sample_pairs)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}, expected 1 or more")
    if index.factory != "auto":
        make_index(index.factory, backbone.key_size)  # an unknown one shows before anything is measured
    log.info("reading %s", datastore.corpus.path)
    corpus = sample_corpus(datastore.corpus, TOKENIZED * sample_pairs)
    with scratch_folder(datastore.folder) as folder:
        log.info("measuring the encoding of %d of %d pairs", min(sample_pairs, corpus.pairs), corpus.pairs)
        with silent():
            encoding, store = measure_encoding(backbone, corpus, datastore, sample_pairs, folder / "store")
        with store:
            size = _size(backbone, datastore, index, encoding, corpus.pairs, entries, machines)
            log.info("measuring %s", size.factory)
            probed = replace(index, factory=size.factory)
            with silent():
                rates = measure_index(store, probed, size.entries, size.nlist, size.train_points)
    log_cut(backbone)
    error = 0.0 if entries is not None else encoding.entries_error / encoding.entries
    return replace(predict(size, encoding, rates), entries_error=error)


def _size(
    backbone: Backbone,
    datastore: DatastoreConfig,
    index: IndexConfig,
    encoding: EncodingRates,
    pairs: int,
    entries: int | None,
    machines: int,
) -> Size:
    """What is to be built, once it is known how many entries a pair has."""
    if entries is None:
        entries = round(pairs * encoding.entries)
    else:
        pairs = max(1, round(entries / encoding.entries))
    factory = choose_factory(entries, backbone.key_size) if index.factory == "auto" else index.factory
    made = make_index(factory, backbone.key_size)
    ivf = find_ivf(made)
    nlist = None if ivf is None else int(ivf.nlist)
    wanted = index.train_points or default_train_points(nlist)
    points = min(wanted, entries)
    check_sample(made, factory, points, entries)
    outside = (
        int(made.sa_code_size() - ivf.sa_code_size()) if ivf is not None and "Refine" in type(made).__name__ else 0
    )
    return Size(
        entries, pairs, backbone.key_size, datastore.shard_entries, factory, nlist, points, outside,
        index.part_entries, index.layout == "shards", index.chunk, machines,
    )  # fmt: skip


def plan(
    backbone: Backbone,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    processes: Processes = Processes(),
    entries: int | None = None,
    machines: int | None = None,
    sample_pairs: int = 2000,
) -> Plan:
    """Print what a build would take, without building: entries, disk, peak memory, and the time of each stage.

    Rates are measured on this machine within about a minute: a sample of the corpus is encoded, and small indexes over
    its keys are trained and filled, in a temporary folder on the datastore's disk.

    Args:
        backbone: The model.
        datastore: The corpus, which is also the sample for other numbers of entries, and where the datastore goes.
        index: The index over it.
        processes: As for building; each counts as a machine.
        entries: Plan for so many entries of texts like those of the corpus, not for the corpus.
        machines: Machines such as this one that share the work, one process each; as many as `processes` by default.
        sample_pairs: Pairs to encode.

    Returns:
        The plan that was printed.

    Raises:
        ValueError: There are no pairs, a number is less than 1, or FAISS does not know the factory string.
    """
    share = processes.devices * processes.num_nodes if machines is None else machines
    planned = make_plan(backbone, datastore, index, entries, share, sample_pairs)
    sys.stdout.write(planned.to_text() + "\n")
    return planned


def _bytes(number: float) -> str:
    """A number of bytes for reading, in powers of 1000.

    >>> _bytes(999), _bytes(2_560_000_000)
    ('999 B', '2.56 GB')
    """
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000 or unit == "TB":
            break
        number /= 1000
    return f"{number:.3g} {unit}" if number < 1000 else f"{number:.0f} {unit}"


def _duration(seconds: float) -> str:
    """Seconds for reading.

    >>> _duration(3.14159), _duration(125), _duration(7320)
    ('3.1 s', '2 min 5 s', '2 h 2 min')
    """
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60:,} h {minutes % 60} min"
