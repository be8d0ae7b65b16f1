"""A trained index without entries, kept while they are added, so that a build which is stopped need not train again."""

from dataclasses import asdict, dataclass
from pathlib import Path

import faiss

from lightning_knnmt.index.faiss_index import write_index
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.sealed import read_sealed, write_sealed


@dataclass(frozen=True)
class Training:
    """What decides the outcome of training.

    Attributes:
        factory: FAISS factory string.
        key_size: D.
        train_points: Size of the sample.
        seed: Its seed.
        split_lists: Share of the lists that splitting makes.
        datastore_sha256: Fingerprint of the datastore's manifest.
        faiss_version: Of the library.
    """

    factory: str
    key_size: int
    train_points: int
    seed: int
    split_lists: float
    datastore_sha256: str
    faiss_version: str = faiss.__version__


@dataclass(frozen=True)
class Trained:
    """What training has made.

    Attributes:
        index: Trained, without entries.
        seconds: Time of each stage so far.
        file: NAME.trained.faiss, where the index is.
        sha256: Checksum of that file.
    """

    index: faiss.Index
    seconds: dict[str, float]
    file: Path
    sha256: str


def save_trained(index: faiss.Index, training: Training, seconds: dict[str, float], path: Path) -> Trained:
    """Write NAME.trained.faiss and then NAME.trained.json.

    Args:
        index: Trained, without entries.
        training: What it was trained with.
        seconds: Time of each stage so far.
        path: Of NAME.faiss.
    """
    binary, description = _files(path)
    description.unlink(missing_ok=True)
    sha256 = write_index(index, binary)
    write_sealed(description, {"training": asdict(training), "seconds": seconds, "faiss_sha256": sha256})
    return Trained(index, seconds, binary, sha256)


def load_trained(training: Training, path: Path) -> Trained | None:
    """What the same training has left; None if there is nothing."""
    binary, description = _files(path)
    try:
        content = read_sealed(description)
        sha256 = content["faiss_sha256"]
        if content["training"] != asdict(training) or file_sha256(binary) != sha256:
            return None
        return Trained(faiss.read_index(str(binary)), content["seconds"], binary, sha256)
    except (OSError, ValueError, KeyError, RuntimeError):  # not there, damaged, or another version's: train again
        return None


def remove_trained(path: Path) -> None:
    """Remove what `save_trained` wrote, if it is there."""
    for file in _files(path):
        if file.exists():  # a folder for reading only refuses to remove even what is not there
            file.unlink()


def _files(path: Path) -> tuple[Path, Path]:
    return path.with_suffix(".trained.faiss"), path.with_suffix(".trained.json")
