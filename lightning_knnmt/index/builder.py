"""From the keys of a datastore to a searchable index."""

import logging
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.datastore import Datastore, DatastoreError
from lightning_knnmt.datastore.files import file_sha256
from lightning_knnmt.datastore.lock import only_writer
from lightning_knnmt.datastore.manifest import FILE_NAME
from lightning_knnmt.functional.clusters import homogeneity, imbalance_factor
from lightning_knnmt.index.config import IndexConfig, choose_factory
from lightning_knnmt.index.faiss_index import FaissIndex, find_ivf
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.index.trained import Training, load_trained, remove_trained, save_trained
from lightning_knnmt.timing import Spans

log = logging.getLogger(__name__)

REFINED = 4  # candidates for each neighbor that a Refine index scores again; FAISS's 1 would only correct distances


def build_index(datastore: Datastore, config: IndexConfig) -> IndexReport:
    """Train an index on a uniform sample of a datastore's keys, add all keys, and write it beside the shards.

    An index of that name that is already there is kept if it was built from this datastore with these settings. One
    that is damaged, or was built from other keys than the datastore now holds, is of no use, and replaced. A build that
    is stopped after training need not train again.

    Args:
        datastore: Whose keys to index.
        config: Factory string, sample and name.

    Returns:
        What was built and how evenly it is filled.

    Raises:
        DatastoreError: An index of that name was built with other settings, another process writes to the datastore's
            folder, or a file could not be written.
        ValueError: FAISS does not know the factory string, or it does not fit the keys.
    """
    factory = choose_factory(len(datastore), datastore.key_size) if config.factory == "auto" else config.factory
    path = datastore.folder / f"{config.name}.faiss"
    index = _make(factory, datastore.key_size)
    points = min(_train_points(index, config), len(datastore))
    training = Training(factory, datastore.key_size, points, config.seed, datastore.fingerprint)
    if (kept := _kept(path, training, config)) is not None:  # before the lock: it may be in a folder for reading only
        return kept
    _check_sample(index, factory, points, len(datastore))
    with only_writer(datastore.folder):
        if (kept := _kept(path, training, config)) is not None:  # another process has just made it
            return kept
        if file_sha256(datastore.folder / FILE_NAME) != datastore.fingerprint:
            raise DatastoreError(f"{datastore.folder} was built anew after it was opened; open it again")
        spans = Spans()
        index = _trained(index, datastore, training, path, spans)
        with spans.span("add"), tqdm(total=len(datastore), desc="add", unit=" keys", unit_scale=True) as progress:
            for keys in datastore.key_chunks(config.chunk):
                _add(index, training.factory, keys.astype(np.float32))
                progress.update(len(keys))
        built = FaissIndex(index)
        with spans.span("write"):
            _description(path).unlink(missing_ok=True)
            sha256 = built.save(path)
        report = _report(built, training, sha256, datastore, dict(spans.seconds))
        report.save(_description(path))
        remove_trained(path)
    return report


def _add(index: faiss.Index, factory: str, keys: NDArray[np.float32]) -> None:
    try:
        index.add(keys)
    except RuntimeError as error:
        raise ValueError(
            f"factory is {factory!r}, to which FAISS cannot add keys in their order ({error}); leave out IDMap"
        ) from error


def open_index(datastore: Datastore, name: str = "index") -> FaissIndex:
    """Open an index of a datastore, refusing one that was built from other keys.

    Raises:
        DatastoreError: The index belongs to another datastore, or is not whole.
    """
    path = datastore.folder / f"{name}.faiss"
    description = _description(path)
    if not path.exists() or not description.exists():
        raise DatastoreError(f"{datastore.folder} has no index called {name!r}; build it with build_index.py")
    report = IndexReport.load(description)
    try:
        index = FaissIndex.load(path)
    except ValueError as error:
        raise DatastoreError(str(error)) from error
    if report.datastore_sha256 != datastore.fingerprint or len(index) != len(datastore):
        raise DatastoreError(
            f"{path} indexes {len(index)} keys of the datastore {report.datastore_sha256[:12]}, but {datastore.folder} "
            f"holds {len(datastore)} keys of {datastore.fingerprint[:12]}; build the index again"
        )
    return index


def _description(path: Path) -> Path:
    return path.with_suffix(".json")


def _kept(path: Path, training: Training, config: IndexConfig) -> IndexReport | None:
    """What is said of the index that makes building needless; None if there is none."""
    if not path.exists() or not _description(path).exists():
        return None
    try:
        existing = IndexReport.load(_description(path))
    except DatastoreError as error:
        log.warning("%s", error)
        return None
    if existing.datastore_sha256 != training.datastore_sha256:
        return None
    if file_sha256(path) != existing.faiss_sha256:
        log.warning("%s is damaged; it is built again", path)
        return None
    wanted = {name: getattr(training, name) for name in ("factory", "train_points", "seed")}
    there = {name: getattr(existing, name) for name in wanted}
    differences = [f"{name} {there[name]} against {wanted[name]}" for name in wanted if there[name] != wanted[name]]
    if not differences:
        remove_trained(path)  # the process may have been killed just before it did
        log.info("%s is already built: %s over %d entries", path, existing.factory, existing.entries)
        return existing
    if not config.overwrite:
        raise DatastoreError(
            f"{path} already holds another index: {'; '.join(differences)} (there against wanted). "
            "Choose another name, or set overwrite: true to replace it."
        )
    return None


def _trained(index: faiss.Index, datastore: Datastore, training: Training, path: Path, spans: Spans) -> faiss.Index:
    """Train, unless an earlier run has."""
    if (loaded := load_trained(training, path)) is not None:
        index, seconds = loaded
        spans.seconds.update(seconds)
        log.info("%s was trained before", training.factory)
        return index
    with spans.span("sample"):
        sample = datastore.sample_keys(training.train_points, training.seed)
    needs_training = not index.is_trained
    with spans.span("train"):
        log.info("training %s on %d of %d keys", training.factory, training.train_points, len(datastore))
        _train(index, training.factory, sample)
    if needs_training:
        save_trained(index, training, dict(spans.seconds), path)
    return index


def _make(factory: str, key_size: int) -> faiss.Index:
    try:
        index = faiss.index_factory(key_size, factory, faiss.METRIC_L2)
    except RuntimeError as error:
        raise ValueError(
            f"factory is {factory!r}, which FAISS cannot make for keys of {key_size} dimensions ({error}); expected a "
            "factory string such as Flat, IVF1024,PQ64x4fs or HNSW32, with a number of sub-quantizers that divides D"
        ) from error
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = REFINED
    return index


def _train(index: faiss.Index, factory: str, sample: NDArray[np.float32]) -> None:
    try:
        index.train(sample)
    except RuntimeError as error:
        raise ValueError(
            f"factory is {factory!r}, which FAISS cannot train on {len(sample)} keys ({error}); expected at least 256 "
            "keys for codes of 8 bits (PQ64) and 16 for codes of 4 bits (PQ64x4fs): choose Flat for a small datastore"
        ) from error


def _train_points(index: faiss.Index, config: IndexConfig) -> int:
    if config.train_points is not None:
        return config.train_points
    ivf = find_ivf(index)
    return 65536 if ivf is None else max(65536, 64 * ivf.nlist)


def _check_sample(index: faiss.Index, factory: str, points: int, entries: int) -> None:
    ivf = find_ivf(index)
    needed = 0 if ivf is None else ivf.nlist
    if points < needed:
        raise ValueError(
            f"factory is {factory!r} with {needed} lists, but there are only {points} training points of {entries} "
            f"entries; expected at least {needed}, better 39 per list: ask for fewer lists or more train_points"
        )


def _report(
    index: FaissIndex, training: Training, sha256: str, datastore: Datastore, seconds: dict[str, float]
) -> IndexReport:
    sizes, lists = index.list_sizes(), index.list_of_entries()
    return IndexReport(
        factory=training.factory,
        entries=len(index),
        key_size=index.key_size,
        nlist=index.nlist,
        train_points=training.train_points,
        seed=training.seed,
        imbalance_factor=None if sizes is None else imbalance_factor(torch.from_numpy(sizes)),
        homogeneity=None if lists is None else homogeneity(torch.from_numpy(lists), torch.from_numpy(datastore.values)),
        datastore_sha256=training.datastore_sha256,
        faiss_sha256=sha256,
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )
