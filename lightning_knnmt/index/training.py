"""Training of lists and codes, and what was trained kept on the disk, so that a stopped build need not train again."""

from dataclasses import asdict, dataclass
from functools import partial

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig, choose_factory, default_train_points
from lightning_knnmt.index.factory import RawIndex, make_index, refusing
from lightning_knnmt.index.faiss_index import read_index, write_index
from lightning_knnmt.index.gpu import Gpus, assigning
from lightning_knnmt.index.layers import find_ivf
from lightning_knnmt.index.splitting import give_centroids
from lightning_knnmt.storage.artifact import CHECKSUM, Artifact


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

    @classmethod
    def plan(cls, datastore: Datastore, config: IndexConfig, entries: int) -> "Training":
        """What is trained, and on what, for a number of entries.

        Raises:
            ValueError: FAISS does not know the factory string, or it does not fit the keys.
        """
        key_size = datastore.key_size
        factory = choose_factory(entries, key_size) if config.factory == "auto" else config.factory
        index = make_index(factory, key_size)
        ivf = find_ivf(index)
        points = config.train_points or default_train_points(None if ivf is None else int(ivf.nlist))
        points = min(points, entries)
        return cls(factory, key_size, points, config.seed, config.split_lists, datastore.fingerprint)

    def check(self, entries: int) -> None:
        """Refuse to train more lists than there are points.

        Raises:
            ValueError: There are fewer points than lists.
        """
        index = make_index(self.factory, self.key_size)
        ivf = find_ivf(index)
        lists = 0 if ivf is None else int(ivf.nlist)
        if self.train_points < lists:
            raise ValueError(
                f"factory is {self.factory!r} with {lists} lists, but there are only {self.train_points} training "
                f"points of {entries} entries; expected at least {lists}, better 39 per list: ask for fewer lists or "
                "more train_points"
            )

    @property
    def can_merge(self) -> bool:
        """Whether FAISS can append one index to another, as it cannot with graphs."""
        index = make_index(self.factory, self.key_size)
        return find_ivf(index) is not None


@dataclass(frozen=True)
class Trained:
    """A trained index without entries.

    Attributes:
        index: The index.
        seconds: Time of each stage so far.
        sha256: Checksum of its file.
    """

    index: RawIndex
    seconds: dict[str, float]
    sha256: str

    @classmethod
    def load(cls, training: Training, artifact: Artifact) -> "Trained | None":
        """What the same training has left; None if there is nothing."""
        if (content := artifact.read({"training": asdict(training)})) is None:
            return None
        try:
            return cls(read_index(artifact.path), content["seconds"], content[CHECKSUM])
        except (ValueError, KeyError):  # another version's
            return None

    @classmethod
    def save(cls, index: RawIndex, training: Training, seconds: dict[str, float], artifact: Artifact) -> "Trained":
        """Write a trained index.

        Raises:
            DatastoreError: It could not be written.
        """
        sha256 = artifact.write(partial(write_index, index))
        artifact.describe({"training": asdict(training), "seconds": seconds}, sha256)
        return cls(index, seconds, sha256)


def train(training: Training, sample: NDArray[np.float32], gpus: Gpus | None) -> RawIndex:
    """Train an index on a sample of shape (N, D).

    Raises:
        ValueError: The sample does not suffice, or `split_lists` is asked for without lists.
    """
    index = make_index(training.factory, training.key_size)
    expected = (
        "at least 256 keys for codes of 8 bits (PQ64) and 16 for codes of 4 bits (PQ64x4fs): choose Flat for a small "
        "datastore"
    )
    with refusing(training.factory, f"train on {len(sample)} keys", expected), assigning(index, gpus):
        if training.split_lists:
            flat = faiss.IndexFlatL2 if gpus is None else gpus.flat
            give_centroids(index, sample, training.split_lists, training.seed, flat)
        index.train(sample)
    return index
