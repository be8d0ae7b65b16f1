"""From the keys of a datastore to an index over them."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.building.parts import Parts, part_ranges, remove_parts
from lightning_knnmt.building.trained import Trained, Training, load_trained, remove_trained, save_trained
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.manifest import read_manifest
from lightning_knnmt.index.balance import homogeneity, imbalance_factor
from lightning_knnmt.index.config import IndexConfig, choose_factory
from lightning_knnmt.index.factory import check_sample, default_train_points, make_index, refusing
from lightning_knnmt.index.faiss_index import FaissIndex, find_ivf, read_index, write_index
from lightning_knnmt.index.gpu import Gpus, adder, assigning, find_gpus
from lightning_knnmt.index.merging import clear_padding, merge, reserve
from lightning_knnmt.index.report import IndexPart, IndexReport
from lightning_knnmt.index.splitting import give_centroids
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import description_file, generation_name, index_file, part_file
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.ranks import Ranks
from lightning_knnmt.timing import Spans

log = logging.getLogger(__name__)


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
        What was built and how evenly it is filled.

    Raises:
        DatastoreError: An index of that name was built with other settings, another process writes to the datastore's
            folder, or a file could not be written.
        ValueError: FAISS does not know the factory string, or it does not fit the keys.
    """
    build = IndexBuild(datastore, config, plan_training(datastore, config, len(datastore)), ranks)
    if (kept := ranks.first(build.kept)) is not None:  # before the lock: it may be in a folder for reading only
        return kept
    build.check()
    with only_writer(datastore.folder, ranks):
        if (kept := ranks.first(build.kept)) is not None:  # another process has just made it
            return kept
        if read_manifest(datastore.folder)[1] != datastore.fingerprint:
            raise DatastoreError(f"{datastore.folder} was built anew after it was opened; open it again")
        return build.make()


def plan_training(datastore: Datastore, config: IndexConfig, entries: int) -> Training:
    """What is trained, and on what, for a number of entries.

    Raises:
        ValueError: FAISS does not know the factory string, or it does not fit the keys.
    """
    factory = choose_factory(entries, datastore.key_size) if config.factory == "auto" else config.factory
    points = min(_train_points(make_index(factory, datastore.key_size), config), entries)
    return Training(factory, datastore.key_size, points, config.seed, config.split_lists, datastore.fingerprint)


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
    ranks: Ranks
    spans: Spans = field(default_factory=Spans)

    @property
    def name(self) -> str:
        """What its files are called."""
        return generation_name(self.config.name, self.datastore.manifest.generation)

    @property
    def path(self) -> Path:
        """NAME.faiss."""
        return index_file(self.datastore.folder, self.name)

    @property
    def description(self) -> Path:
        """NAME.json."""
        return description_file(self.datastore.folder, self.name)

    @cached_property
    def adding(self) -> Gpus | None:
        """The GPUs that this process adds keys with, kept for all parts; None: the CPU."""
        gpus = find_gpus(self.config.device)
        return None if gpus is None else gpus.share(self.ranks.rank, self.ranks.size)

    def check(self) -> None:
        """Refuse to train more lists than there are points, or on GPUs that are not there.

        Raises:
            ValueError: There are fewer points than lists, or no GPU where one is asked for.
        """
        find_gpus(self.config.device)
        factory = self.training.factory
        index = make_index(factory, self.training.key_size)
        check_sample(index, factory, self.training.train_points, len(self.datastore))

    def make(self) -> IndexReport:
        """Train, add and write, whatever is there."""
        index = make_index(self.training.factory, self.training.key_size)
        ranges = part_ranges([shard.entries for shard in self.datastore.manifest.shards], self.config.part_entries)
        can_merge = find_ivf(index) is not None  # FAISS cannot append one graph to another
        if self.config.layout == "shards" or (can_merge and len(ranges) > 1):
            return self.in_parts(index, ranges)
        return self.ranks.first(lambda: self.whole(index))

    def kept(self) -> IndexReport | None:
        """What is said of the index that makes building needless; None if there is none."""
        if not self.path.exists() or not self.description.exists():
            return None
        try:
            existing = IndexReport.load(self.description)
        except DatastoreError as error:
            log.warning("%s", error)
            return None
        if existing.datastore_sha256 != self.training.datastore_sha256:
            return None
        if (damaged := existing.damaged(self.path)) is not None:
            log.warning("%s is damaged; it is built again", damaged)
            return None
        training = plan_training(self.datastore, self.config, existing.trained_entries)
        wanted = {name: getattr(training, name) for name in ("factory", "train_points", "seed", "split_lists")}
        wanted["layout"] = self.config.layout
        there = {name: getattr(existing, name) for name in wanted}
        differences = [f"{name} {there[name]} against {wanted[name]}" for name in wanted if there[name] != wanted[name]]
        if not differences:
            self.clean(existing)  # the process may have been killed just before it did
            log.info("%s is already built: %s over %d entries", self.path, existing.factory, existing.entries)
            return existing
        if not self.config.overwrite:
            raise DatastoreError(
                f"{self.path} already holds another index: {'; '.join(differences)} (there against wanted). "
                "Choose another name, or set overwrite: true to replace it."
            )
        return None

    def whole(self, index: faiss.Index) -> IndexReport:
        """Add all entries to one index."""
        index = self._trained(index).index
        self.add(index, self.datastore.key_chunks(self.config.chunk), len(self.datastore))
        return self._finish(index)

    def in_parts(self, index: faiss.Index, ranges: list[range]) -> IndexReport:
        """Add the entries of each part to an index of its own, and merge these if asked for."""

        def train() -> tuple[Path, str]:
            self.description.unlink(missing_ok=True)  # of an index that may have parts of the same names
            trained = self._trained(index)
            return trained.file, trained.sha256

        file, sha256 = self.ranks.first(train)
        parts = Parts(self.datastore.folder, self.name, self.training, sha256, ranges)
        self.ranks.each(lambda: self._add_parts(parts, file))
        return self.ranks.first(lambda: self._finish_parts(parts, file))

    def _trained(self, index: faiss.Index) -> Trained:
        """Train, unless an earlier run has."""
        if (trained := load_trained(self.training, self.path)) is not None:
            self.spans.seconds.update(trained.seconds)
            log.info("%s was trained before", self.training.factory)
            return trained
        with self.spans.span("sample"):
            sample = self.datastore.sample_keys(self.training.train_points, self.training.seed)
        with self.spans.span("train"):
            log.info("training %s on %d of %d keys", self.training.factory, len(sample), len(self.datastore))
            _train(index, self.training, sample, find_gpus(self.config.device))
        return save_trained(index, self.training, dict(self.spans.seconds), self.path)

    def add(self, index: faiss.Index, chunks: Iterable[NDArray[np.float16]], entries: int, what: str = "add") -> None:
        """Add keys, with a progress bar over so many entries."""
        progress = tqdm(total=entries, desc=what, unit=" keys", unit_scale=True, disable=self.ranks.rank > 0)
        with self.spans.span("add"), progress, adder(index, self.adding) as add:
            reserve(index, int(index.ntotal) + entries)
            for keys in chunks:
                with refusing(self.training.factory, "add keys to in their order", "one without IDMap"):
                    add(keys.astype(np.float32))
                progress.update(len(keys))

    def _add_parts(self, parts: Parts, trained: Path) -> None:
        """Add the entries of those parts that are this process's to make and not made yet."""
        for number in range(self.ranks.rank, len(parts.ranges), self.ranks.size):
            entries = parts.ranges[number]
            if parts.finished(number) is not None:
                log.info("%s is already built: %d entries", parts.file(number), len(entries))
                continue
            index = read_index(trained)
            label = f"add part {number + 1} of {len(parts.ranges)}"
            self.add(index, self.datastore.key_chunks(self.config.chunk, entries), len(entries), label)
            with self.spans.span("write"):
                parts.save(number, index)

    def _finish_parts(self, parts: Parts, trained: Path) -> IndexReport:
        made = [parts.finished(number) for number in range(len(parts.ranges))]
        if (lost := [str(parts.file(number)) for number, part in enumerate(made) if part is None]) != []:
            raise DatastoreError(f"{', '.join(lost)} changed after being written; run the same command again")
        index = read_index(trained)
        if self.config.layout == "shards":
            return self._finish(index, tuple(part for part in made if part is not None))
        with self.spans.span("merge"):
            reserve(index, len(self.datastore))
            for number, entries in enumerate(parts.ranges):
                merge(index, read_index(parts.file(number)), entries.start)
            clear_padding(index)
        return self._finish(index)

    def _finish(self, index: faiss.Index, parts: tuple[IndexPart, ...] = ()) -> IndexReport:
        with self.spans.span("write"):
            self.description.unlink(missing_ok=True)
            sha256 = write_index(index, self.path)
        files = [part_file(self.datastore.folder, self.name, number) for number in range(len(parts))]
        indexes = map(FaissIndex.load, files) if parts else [FaissIndex(index)]
        report = self.report(indexes, sha256, parts)
        report.save(self.description)
        self.clean(report)
        return report

    def report(self, indexes: Iterable[FaissIndex], sha256: str, parts: tuple[IndexPart, ...]) -> IndexReport:
        """What is said of the index.

        Args:
            indexes: Its parts, or the whole of it.
            sha256: Checksum of NAME.faiss.
            parts: The files of the parts.
        """
        sizes: list[NDArray[np.int64]] = []
        lists: list[NDArray[np.int32]] = []
        for index in indexes:  # one at a time, since all together may not fit into memory
            if (of_part := index.list_sizes()) is not None and (assigned := index.list_of_entries()) is not None:
                sizes.append(of_part)
                lists.append(assigned)
        tokens = torch.from_numpy(self.datastore.values)
        return IndexReport(
            factory=self.training.factory,
            entries=len(self.datastore),
            key_size=self.datastore.key_size,
            nlist=len(sizes[0]) if sizes else None,
            train_points=self.training.train_points,
            seed=self.training.seed,
            split_lists=self.training.split_lists,
            imbalance_factor=imbalance_factor(torch.from_numpy(np.sum(sizes, axis=0))) if sizes else None,
            homogeneity=homogeneity(torch.from_numpy(np.concatenate(lists)), tokens) if lists else None,
            datastore_sha256=self.training.datastore_sha256,
            faiss_sha256=sha256,
            seconds={name: round(value, 3) for name, value in self.spans.seconds.items()},
            parts=parts,
        )

    def clean(self, report: IndexReport) -> None:
        """Remove what building has left, but for the files of the finished index."""
        remove_trained(self.path)
        remove_parts(self.datastore.folder, self.name, kept=len(report.parts))


def _train(index: faiss.Index, training: Training, sample: NDArray[np.float32], gpus: Gpus | None) -> None:
    expected = (
        "at least 256 keys for codes of 8 bits (PQ64) and 16 for codes of 4 bits (PQ64x4fs): choose Flat for a small "
        "datastore"
    )
    with refusing(training.factory, f"train on {len(sample)} keys", expected), assigning(index, gpus):
        if training.split_lists:
            flat = faiss.IndexFlatL2 if gpus is None else gpus.flat
            give_centroids(index, sample, training.split_lists, training.seed, flat)
        index.train(sample)


def _train_points(index: faiss.Index, config: IndexConfig) -> int:
    if config.train_points is not None:
        return config.train_points
    ivf = find_ivf(index)
    return default_train_points(None if ivf is None else ivf.nlist)
