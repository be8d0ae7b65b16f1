"""From the keys of a datastore to an index over them."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.manifest import read_manifest
from lightning_knnmt.index.balance import homogeneity, imbalance_factor
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.factory import RawIndex, refusing
from lightning_knnmt.index.faiss_index import FaissIndex, read_index, write_index
from lightning_knnmt.index.gpu import Gpus, adder, find_gpus
from lightning_knnmt.index.layers import seen_by
from lightning_knnmt.index.merging import clear_padding, merge, reserve
from lightning_knnmt.index.report import IndexPart, IndexReport
from lightning_knnmt.index.training import Training, train
from lightning_knnmt.storage.artifact import CHECKSUM, Artifact
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import link_or_copy
from lightning_knnmt.storage.layout import generation_name, index_file, part_file, remove_unfinished, trained_file
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.ranks import Ranks
from lightning_knnmt.timing import Spans

log = logging.getLogger(__name__)

TRAINED = ("factory", "metric", "unit_centroids", "train_points", "seed", "split_lists")  # decide what an index is


def build_index(datastore: Datastore, config: IndexConfig, ranks: Ranks = Ranks()) -> IndexReport:
    """Train an index on a uniform sample of a datastore's keys, add all keys, and write it beside the shards.

    An index of that name that is already there is kept if it was built from this datastore with these settings. One
    that is damaged, or was built from other keys than the datastore now holds, is of no use, and replaced. A build that
    is stopped after training need not train again, and one in several parts continues from the last whole part.

    Args:
        datastore: Whose keys to index.
        config: Factory string, sample and name.
        ranks: This process's place among those that build it together: rank 0 trains, and each adds every so many-th
            part.

    Returns:
        The description of what was built.

    Raises:
        DatastoreError: An index of that name was built with other settings, another process writes to the datastore's
            folder, or a file could not be written.
        ValueError: FAISS does not know the factory string, or it does not fit the keys.
    """
    build = IndexBuild(datastore, config, Training.plan(datastore, config, len(datastore)), ranks)
    if (kept := ranks.first(build.kept)) is not None:  # before the lock: it may be in a folder for reading only
        return kept
    find_gpus(config.device)  # a GPU that is asked for and not there shows before anything is done
    build.training.check(len(datastore))
    with only_writer(datastore.folder, ranks):
        if (kept := ranks.first(build.kept)) is not None:  # another process has just made it
            return kept
        if read_manifest(datastore.folder)[1] != datastore.fingerprint:
            raise DatastoreError(f"{datastore.folder} was built anew after it was opened; open it again")
        return build.make()


def part_ranges(shards: Sequence[int], least: int) -> list[range]:
    """The entries of each part: those of whole shards, until there are enough; at least one part.

    Args:
        shards: Entries of each shard.
        least: Least number of entries of a part, but for the last.

    >>> part_ranges([5, 5, 5, 5, 5], 10)
    [range(0, 10), range(10, 20), range(20, 25)]
    """
    ranges, start, stop = [], 0, 0
    for entries in shards:
        stop += entries
        if stop - start >= least:
            ranges.append(range(start, stop))
            start = stop
    if start < stop or not ranges:
        ranges.append(range(start, stop))
    return ranges


@dataclass(frozen=True)
class IndexBuild:
    """One run of building an index, seen by one of its processes; the caller has seen to it that nobody else writes.

    Attributes:
        datastore: Whose keys.
        config: As asked for.
        training: What is trained, and on what.
        ranks: This process's place.
        spans: Time of each stage.
    """

    datastore: Datastore
    config: IndexConfig
    training: Training
    ranks: Ranks = Ranks()
    spans: Spans = field(default_factory=Spans)

    @property
    def name(self) -> str:
        """The name of its files, with the datastore's generation."""
        return generation_name(self.config.name, self.datastore.manifest.generation)

    @property
    def path(self) -> Path:
        """NAME.faiss."""
        return index_file(self.datastore.folder, self.name)

    def part(self, number: int) -> Artifact:
        """The file of a part, with the description that it has while others are missing."""
        return Artifact(part_file(self.datastore.folder, self.name, number))

    @cached_property
    def gpus(self) -> Gpus | None:
        """The GPUs that this process adds keys with, kept for all parts; None: the CPU."""
        gpus = find_gpus(self.config.device)
        return None if gpus is None else gpus.share(self.ranks.rank, self.ranks.size)

    def kept(self) -> IndexReport | None:
        """The description of the index that makes building needless; None if there is none."""
        description = Artifact(self.path).description
        if not self.path.exists() or not description.exists():
            return None
        try:
            existing = IndexReport.load(description)
        except DatastoreError as error:
            log.warning("%s", error)
            return None
        if existing.datastore_sha256 != self.training.datastore_sha256:
            return None
        if (damaged := existing.damaged(self.path)) is not None:
            log.warning("%s is damaged; it is built again", damaged)
            return None
        training = Training.plan(self.datastore, self.config, existing.trained_entries)
        wanted = {name: getattr(training, name) for name in TRAINED}
        wanted["layout"] = self.config.layout
        there = {name: getattr(existing, name) for name in wanted}
        differences = [f"{name} {there[name]} against {wanted[name]}" for name in wanted if there[name] != wanted[name]]
        if not differences:
            self._remove_unfinished(existing)  # the process may have been killed just before it did
            log.info("%s is already built: %s over %d entries", self.path, existing.factory, existing.entries)
            return existing
        if not self.config.overwrite:
            raise DatastoreError(
                f"{self.path} already holds another index: {'; '.join(differences)} (there against wanted). "
                "Choose another name, or set overwrite: true to replace it."
            )
        return None

    def make(self) -> IndexReport:
        """Train, add all keys, write and describe the index, whatever is there.

        In several parts, each process adds the keys of every so many-th part to an index of its own, which starts as
        the trained one; these are kept, or merged in the end. A part that an earlier run has left is not made again.
        """
        ranges = part_ranges([shard.entries for shard in self.datastore.manifest.shards], self.config.part_entries)
        if self.config.layout == "whole" and (len(ranges) == 1 or not self.training.can_merge):
            return self.ranks.first(self._make_whole)

        def begin() -> str:
            Artifact(self.path).description.unlink(missing_ok=True)  # of an index that may have parts of the same names
            return self._train()[1]

        trained_sha256 = self.ranks.first(begin)
        expected = [
            {
                "training": asdict(self.training), "trained_sha256": trained_sha256, "first": entries.start,
                "entries": len(entries),
            }
            for entries in ranges
        ]  # fmt: skip
        self.ranks.each(lambda: self._make_parts(ranges, expected))
        return self.ranks.first(lambda: self._join(ranges, expected))

    def _train(self) -> tuple[RawIndex, str]:
        """An index without entries and its file's checksum; trained, unless an earlier run of the same training has."""
        artifact = Artifact(trained_file(self.datastore.folder, self.name))
        described = {"training": asdict(self.training)}
        if (content := artifact.read(described)) is not None:
            self.spans.seconds.update(content["seconds"])
            log.info("%s was trained before", self.training.factory)
            return read_index(artifact.path), content[CHECKSUM]
        with self.spans.span("sample"):
            sample = self.datastore.sample_keys(self.training.train_points, self.training.seed)
        with self.spans.span("train"):
            log.info("training %s on %d of %d keys", self.training.factory, len(sample), len(self.datastore))
            index = train(self.training, sample, find_gpus(self.config.device))
        sha256 = artifact.write(partial(write_index, index))
        artifact.describe({**described, "seconds": dict(self.spans.seconds)}, sha256)
        return index, sha256

    def _make_whole(self) -> IndexReport:
        index = self._train()[0]
        self.add(index, self.datastore.key_chunks(self.config.chunk), len(self.datastore))
        return self._finish(index)

    def _make_parts(self, ranges: list[range], expected: list[dict[str, object]]) -> None:
        """Make those parts that are this process's to make and not made yet."""
        for number in range(self.ranks.rank, len(ranges), self.ranks.size):
            entries, part = ranges[number], self.part(number)
            if part.read(expected[number]) is not None:
                log.info("%s is already built: %d entries", part.path, len(entries))
                continue
            index = read_index(trained_file(self.datastore.folder, self.name))
            label = f"add part {number + 1} of {len(ranges)}"
            self.add(index, self.datastore.key_chunks(self.config.chunk, entries), len(entries), label)
            with self.spans.span("write"):
                part.describe(expected[number], part.write(partial(write_index, index)))

    def _join(self, ranges: list[range], expected: list[dict[str, object]]) -> IndexReport:
        """Finish an index whose parts are there."""
        made = [self.part(number).read(each) for number, each in enumerate(expected)]
        if lost := [str(self.part(number).path) for number, each in enumerate(made) if each is None]:
            raise DatastoreError(f"{', '.join(lost)} changed after being written; run the same command again")
        index = read_index(trained_file(self.datastore.folder, self.name))
        if self.config.layout == "shards":
            sums = [each[CHECKSUM] for each in made if each is not None]
            return self._finish(
                index, tuple(IndexPart(len(entries), sha) for entries, sha in zip(ranges, sums, strict=True))
            )
        with self.spans.span("merge"):
            reserve(index, len(self.datastore))
            for number, entries in enumerate(ranges):
                merge(index, read_index(self.part(number).path), entries.start)
            clear_padding(index)
        return self._finish(index)

    def add(self, index: RawIndex, chunks: Iterable[NDArray[np.float16]], entries: int, what: str = "add") -> None:
        """Add keys, with a progress bar over so many entries."""
        progress = tqdm(total=entries, desc=what, unit=" keys", unit_scale=True, disable=self.ranks.rank > 0)
        with self.spans.span("add"), progress, adder(index, self.gpus) as add:
            reserve(index, int(index.ntotal) + entries)
            for keys in chunks:
                with refusing(self.training.factory, "add keys to in their order", "one without IDMap"):
                    add(seen_by(keys.astype(np.float32), self.training.metric))
                progress.update(len(keys))

    def _finish(self, index: RawIndex, parts: tuple[IndexPart, ...] = ()) -> IndexReport:
        with self.spans.span("write"):
            sha256 = Artifact(self.path).write(partial(write_index, index))
        return self.describe(index, sha256, parts)

    def extend(self, report: IndexReport, before: str) -> IndexReport:
        """Add the entries by which the datastore has grown to an index of it: to its only file, or as a further part.

        Args:
            report: The description of the index.
            before: Its name, with the generation.
        """
        folder, entries = self.datastore.folder, range(report.entries, len(self.datastore))
        index = read_index(index_file(folder, before))
        chunks = self.datastore.key_chunks(self.config.chunk, entries)
        self.add(index, chunks, len(entries), f"add to {self.config.name}")
        sha256, parts = report.faiss_sha256, report.parts
        if parts:
            link_or_copy(index_file(folder, before), self.path)
            for number in range(len(parts)):
                link_or_copy(part_file(folder, before, number), self.part(number).path)
            parts = (*parts, IndexPart(len(entries), write_index(index, self.part(len(parts)).path)))
        else:
            sha256 = Artifact(self.path).write(partial(write_index, index))
        then = report.trained_imbalance_factor if report.added else report.imbalance_factor
        return self.describe(
            index, sha256, parts, seconds=report.seconds, added=report.added + len(entries),
            trained_imbalance_factor=then,
        )  # fmt: skip

    def describe(self, index: RawIndex, sha256: str, parts: tuple[IndexPart, ...], **others: Any) -> IndexReport:
        """Measure how evenly the index is filled, write its description, and remove what is not needed any more.

        Args:
            index: The whole index if it is in one file.
            sha256: Checksum of NAME.faiss.
            parts: The files of the parts.
            others: Fields of the description that say what happened after training.
        """
        metric = self.training.metric
        sizes: list[NDArray[np.int64]] = []
        lists: list[NDArray[np.int32]] = []
        of_parts = (FaissIndex.load(self.part(number).path, metric=metric) for number in range(len(parts)))
        # one at a time: they may not fit into memory
        for part in of_parts if parts else [FaissIndex(index, metric=metric)]:
            if (of_part := part.list_sizes()) is not None and (assigned := part.list_of_entries()) is not None:
                sizes.append(of_part)
                lists.append(assigned)
        tokens = torch.from_numpy(self.datastore.values)
        report = IndexReport(
            factory=self.training.factory,
            entries=len(self.datastore),
            key_size=self.datastore.key_size,
            nlist=len(sizes[0]) if sizes else None,
            train_points=self.training.train_points,
            seed=self.training.seed,
            split_lists=self.training.split_lists,
            metric=self.training.metric,
            unit_centroids=self.training.unit_centroids,
            imbalance_factor=imbalance_factor(torch.from_numpy(np.sum(sizes, axis=0))) if sizes else None,
            homogeneity=homogeneity(torch.from_numpy(np.concatenate(lists)), tokens) if lists else None,
            datastore_sha256=self.training.datastore_sha256,
            faiss_sha256=sha256,
            seconds={name: round(value, 3) for name, value in self.spans.seconds.items()},
            parts=parts,
        )
        report = replace(report, **others)
        report.save(self.path)
        self._remove_unfinished(report)
        return report

    def _remove_unfinished(self, report: IndexReport) -> None:
        remove_unfinished(self.datastore.folder, self.name, len(report.parts))
