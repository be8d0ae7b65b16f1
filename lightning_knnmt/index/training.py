"""Training of an index: its lists and codes."""

from dataclasses import dataclass
from functools import partial

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig, choose_factory, default_train_points
from lightning_knnmt.index.factory import RawIndex, make_index, refusing
from lightning_knnmt.index.gpu import Gpus, assigning
from lightning_knnmt.index.layers import FAISS_METRICS, find_ivf, seen_by
from lightning_knnmt.index.splitting import give_centroids
from lightning_knnmt.metric import Metric


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
        metric: By what keys are near.
        unit_centroids: Whether centroids of lists have unit norm.
        faiss_version: Of the library.
    """

    factory: str
    key_size: int
    train_points: int
    seed: int
    split_lists: float
    datastore_sha256: str
    metric: Metric = "l2"
    unit_centroids: bool = False
    faiss_version: str = faiss.__version__

    @classmethod
    def plan(cls, datastore: Datastore, config: IndexConfig, entries: int) -> "Training":
        """What is trained, and on what, for a number of entries.

        Raises:
            ValueError: FAISS does not know the factory string, or it does not fit the keys.
        """
        key_size = datastore.key_size
        factory = choose_factory(entries, key_size) if config.factory == "auto" else config.factory
        index = make_index(factory, key_size, config.metric)
        ivf = find_ivf(index)
        points = config.train_points or default_train_points(None if ivf is None else int(ivf.nlist))
        points = min(points, entries)
        return cls(
            factory, key_size, points, config.seed, config.split_lists, datastore.fingerprint, config.metric,
            config.unit_centroids,
        )  # fmt: skip

    def make(self) -> RawIndex:
        """The index before training."""
        return make_index(self.factory, self.key_size, self.metric, self.unit_centroids)

    def check(self, entries: int) -> None:
        """Refuse to train more lists than there are points.

        Raises:
            ValueError: There are fewer points than lists.
        """
        index = self.make()
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
        index = self.make()
        return find_ivf(index) is not None


def train(training: Training, sample: NDArray[np.float32], gpus: Gpus | None) -> RawIndex:
    """Train an index on a sample of shape (N, D).

    Raises:
        ValueError: The sample does not suffice, or `split_lists` is asked for without lists.
    """
    index = training.make()
    sample = seen_by(sample, training.metric)
    expected = (
        "at least 256 keys for codes of 8 bits (PQ64) and 16 for codes of 4 bits (PQ64x4fs): choose Flat for a small "
        "datastore"
    )
    with refusing(training.factory, f"train on {len(sample)} keys", expected), assigning(index, gpus):
        if training.split_lists:
            number = FAISS_METRICS[training.metric]
            flat = partial(_flat, metric=number) if gpus is None else partial(gpus.flat, metric=number)
            give_centroids(index, sample, training.split_lists, training.seed, flat, training.unit_centroids)
        index.train(sample)
    return index


def _flat(size: int, metric: int) -> RawIndex:
    return faiss.IndexFlat(size, metric)
