"""From the keys of a datastore to a searchable index."""

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.datastore import Datastore, DatastoreError
from lightning_knnmt.datastore.manifest import FILE_NAME, file_sha256
from lightning_knnmt.functional.clusters import homogeneity, imbalance_factor
from lightning_knnmt.index.config import IndexConfig, choose_factory
from lightning_knnmt.index.faiss_index import FaissIndex, find_ivf
from lightning_knnmt.timing import Spans

log = logging.getLogger(__name__)

REFINED = 4  # candidates for each neighbor that a Refine index scores again; FAISS's 1 would only correct distances


@dataclass(frozen=True)
class IndexReport:
    """What an index is, and how evenly it is filled; the contents of NAME.json.

    Attributes:
        factory: FAISS factory string.
        entries: Entries in it.
        key_size: D.
        nlist: Inverted lists; None if the index has none.
        train_points: Keys that it was trained on.
        seed: Seed of that sample.
        imbalance_factor: 1 is perfect; None without lists.
        homogeneity: Of target tokens over lists; None without lists.
        datastore_sha256: Fingerprint of the datastore's manifest.
        seconds: Time of each stage of building.
    """

    factory: str
    entries: int
    key_size: int
    nlist: int | None
    train_points: int
    seed: int
    imbalance_factor: float | None
    homogeneity: float | None
    datastore_sha256: str
    seconds: dict[str, float]

    @classmethod
    def load(cls, path: Path) -> "IndexReport":
        """Read NAME.json.

        Raises:
            DatastoreError: It is damaged.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise DatastoreError(f"{path} is damaged ({error}); build the index again") from error


def build_index(datastore: Datastore, config: IndexConfig) -> IndexReport:
    """Train an index on a uniform sample of a datastore's keys, add all keys, and write it beside the shards.

    An index of that name that is already there is kept if it was built from this datastore with these settings. One
    that is damaged, or was built from other keys than the datastore now holds, is of no use, and replaced.

    Args:
        datastore: Whose keys to index.
        config: Factory string, sample and name.

    Returns:
        What was built and how evenly it is filled.

    Raises:
        DatastoreError: An index of that name was built with other settings.
        ValueError: FAISS does not know the factory string, or it does not fit the keys.
    """
    factory = choose_factory(len(datastore), datastore.key_size) if config.factory == "auto" else config.factory
    path = datastore.folder / f"{config.name}.faiss"
    description = path.with_suffix(".json")
    index = _make(factory, datastore.key_size)
    points = min(_train_points(index, config), len(datastore))
    existing = _existing(path, description, datastore)
    if existing is not None:
        differences = _differences(existing, factory, points, config.seed)
        if not differences:
            log.info("%s is already built: %s over %d entries", path, existing.factory, existing.entries)
            return existing
        if not config.overwrite:
            raise DatastoreError(
                f"{path} already holds another index: {'; '.join(differences)} (there against wanted). "
                "Choose another name, or set overwrite: true to replace it."
            )
    _check_sample(index, factory, points, len(datastore))
    spans = Spans()
    with spans.span("sample"):
        sample = datastore.sample_keys(points, config.seed)
    with spans.span("train"):
        log.info("training %s on %d of %d keys", factory, points, len(datastore))
        _train(index, factory, sample)
    with spans.span("add"), tqdm(total=len(datastore), desc="add", unit=" keys", unit_scale=True) as progress:
        for keys in datastore.key_chunks(config.chunk):
            index.add(keys.astype("float32"))
            progress.update(len(keys))
    built = FaissIndex(index)
    with spans.span("write"):
        description.unlink(missing_ok=True)
        built.save(path)
    report = _report(built, factory, points, config, datastore, dict(spans.seconds))
    beside = description.with_name(description.name + ".partial")
    beside.write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    beside.replace(description)
    return report


def open_index(datastore: Datastore, name: str = "index") -> FaissIndex:
    """Open an index of a datastore, refusing one that was built from other keys.

    Raises:
        DatastoreError: The index belongs to another datastore, or is not whole.
    """
    path = datastore.folder / f"{name}.faiss"
    description = path.with_suffix(".json")
    if not path.exists() or not description.exists():
        raise DatastoreError(f"{datastore.folder} has no index called {name!r}; build it with build_index.py")
    report = IndexReport.load(description)
    try:
        index = FaissIndex.load(path)
    except ValueError as error:
        raise DatastoreError(str(error)) from error
    if report.datastore_sha256 != datastore_fingerprint(datastore) or len(index) != len(datastore):
        raise DatastoreError(
            f"{path} indexes {len(index)} keys of the datastore {report.datastore_sha256[:12]}, but {datastore.folder} "
            f"holds {len(datastore)} keys of {datastore_fingerprint(datastore)[:12]}; build the index again"
        )
    return index


def datastore_fingerprint(datastore: Datastore) -> str:
    """SHA-256 of the manifest, which holds the checksums of all shards."""
    return file_sha256(datastore.folder / FILE_NAME)


def _existing(path: Path, description: Path, datastore: Datastore) -> IndexReport | None:
    """What is said of an index that is of use; None if there is none."""
    if not path.exists() or not description.exists():
        return None
    try:
        report = IndexReport.load(description)
        index = FaissIndex.load(path)
    except (DatastoreError, ValueError) as error:
        log.warning("%s", error)
        return None
    fits = report.datastore_sha256 == datastore_fingerprint(datastore) and len(index) == len(datastore)
    return report if fits else None


def _differences(existing: IndexReport, factory: str, points: int, seed: int) -> list[str]:
    wanted = {"factory": factory, "train_points": points, "seed": seed}
    there = {name: getattr(existing, name) for name in wanted}
    return [f"{name} {there[name]} against {wanted[name]}" for name in wanted if there[name] != wanted[name]]


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
    index: FaissIndex, factory: str, points: int, config: IndexConfig, datastore: Datastore, seconds: dict[str, float]
) -> IndexReport:
    sizes, lists = index.list_sizes(), index.list_of_entries()
    return IndexReport(
        factory=factory,
        entries=len(index),
        key_size=index.key_size,
        nlist=index.nlist,
        train_points=points,
        seed=config.seed,
        imbalance_factor=None if sizes is None else imbalance_factor(torch.from_numpy(sizes)),
        homogeneity=None if lists is None else homogeneity(torch.from_numpy(lists), torch.from_numpy(datastore.values)),
        datastore_sha256=datastore_fingerprint(datastore),
        seconds={name: round(value, 3) for name, value in seconds.items()},
    )
