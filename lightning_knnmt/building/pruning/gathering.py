"""Neighbors of stored entries, and which of them the model predicts, kept chunk by chunk for runs that are stopped."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.pruning.rules import Evidence, PruningRule
from lightning_knnmt.datastore.store import Datastore
from lightning_knnmt.index.opening import open_index, read_report
from lightning_knnmt.storage.artifact import Artifact
from lightning_knnmt.storage.files import durable_file, file_sha256

CHUNK = 1 << 18  # entries whose evidence is one file
AT_ONCE = 4096  # entries that are searched for or projected together


class Gathering:
    """Evidence of a datastore's entries, in a folder from which a run that was stopped goes on.

    Args:
        store: The datastore.
        folder: Where what is known so far is kept.
        chunk: Entries of a file.
    """

    def __init__(self, store: Datastore, folder: Path, chunk: int = CHUNK) -> None:
        self.store, self.folder, self.chunk = store, folder, chunk
        self.there = ~store.removed.covers(np.arange(len(store)))
        self._identity = {
            "datastore_sha256": store.fingerprint,
            "removed_sha256": None if store.manifest.removed is None else store.manifest.removed.sha256,
            "chunk": chunk,
        }

    def evidence(self, rule: PruningRule, model: KeyedModel | None, index: str, nprobe: int) -> Evidence:
        """What a rule decides by, of the entries that were not removed.

        Args:
            rule: The rule.
            model: The model, where the rule asks for it.
            index: Name of the index in which neighbors are searched.
            nprobe: Inverted lists that each search scans.
        """
        weights = np.ones(len(self.store), np.int32) if self.store.weights is None else self.store.weights
        number = np.cumsum(self.there) - 1  # [entry -> its number among those that are there]
        neighbors = self.neighbors(rule.neighbors, index, nprobe)
        return Evidence(
            self.store.values[self.there], weights[self.there],
            np.where(neighbors >= 0, number[neighbors], -1)[self.there],
            np.empty(0, bool) if model is None or not rule.asks_model else self.predicted(model)[self.there],
        )  # fmt: skip

    def neighbors(self, k: int, index: str, nprobe: int) -> NDArray[np.int64]:
        """The K nearest others of every entry, −1 where there are fewer, shape (N, K)."""
        if k == 0 or not len(self.store):
            return np.empty((len(self.store), k), np.int64)
        searched = open_index(self.store, index)
        settings = {"k": k, "nprobe": nprobe, "faiss_sha256_of_index": read_report(self.store, index).faiss_sha256}

        def search(keys: NDArray[np.float16], first: int) -> NDArray[np.int64]:
            _, found = searched.search(keys.astype(np.float32), k + 1, nprobe)
            return without_self(found, np.arange(first, first + len(keys)))

        return self._all("neighbors", settings, search)

    def predicted(self, model: KeyedModel) -> NDArray[np.bool_]:
        """Whether the model's most probable token is the stored one, shape (N,)."""
        if not len(self.store):
            return np.empty(0, bool)

        def predict(keys: NDArray[np.float16], first: int) -> NDArray[np.bool_]:
            with torch.inference_mode():
                states = torch.from_numpy(keys.astype(np.float32)).to(model.device, getattr(torch, model.dtype))
                best = torch.cat([model.project(part).argmax(1) for part in states.split(512)])
            tokens: NDArray[np.int64] = best.cpu().numpy()
            return tokens == self.store.values[first : first + len(keys)]

        return self._all("predicted", {"model_sha256": model.model_fingerprint}, predict)

    def _all(
        self, name: str, settings: dict[str, Any], work: Callable[[NDArray[np.float16], int], NDArray[Any]]
    ) -> NDArray[Any]:
        """What some work finds of all entries; chunks that are there are taken from their files."""
        self.folder.mkdir(parents=True, exist_ok=True)
        parts = []
        with tqdm(total=len(self.store), desc=name, unit=" entries", unit_scale=True) as progress:
            for number, first in enumerate(range(0, len(self.store), self.chunk)):
                entries = range(first, min(first + self.chunk, len(self.store)))
                artifact = Artifact(self.folder / f"{name}-{number:05d}.npy")
                if artifact.read({**self._identity, **settings}) is None:
                    starts = iter(range(first, entries.stop, AT_ONCE))
                    found = []
                    for keys in self._keys(entries):
                        found.append(work(keys, next(starts)))
                        progress.update(len(keys))
                    sha256 = artifact.write(partial(_save, np.concatenate(found)))
                    artifact.describe({**self._identity, **settings}, sha256)
                else:
                    progress.update(len(entries))
                parts.append(np.load(artifact.path, allow_pickle=False))
        return np.concatenate(parts)

    def _keys(self, entries: range) -> Any:
        """Keys of entries, so many at a time whatever the shards."""
        waiting = np.empty((0, self.store.key_size), np.float16)
        for keys in self.store.key_chunks(AT_ONCE, entries):
            waiting = np.concatenate([waiting, keys])
            while len(waiting) >= AT_ONCE:
                yield waiting[:AT_ONCE]
                waiting = waiting[AT_ONCE:]
        if len(waiting):
            yield waiting

    def clear(self) -> None:
        """Remove what was kept for runs that are stopped."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                path.unlink()
            self.folder.rmdir()


def without_self(found: NDArray[np.int64], entries: NDArray[np.int64]) -> NDArray[np.int64]:
    """The K nearest others of some entries, of K + 1 that a search has found; missing ones last.

    >>> without_self(np.array([[4, 7, 9], [4, 7, 9]]), np.array([7, 8]))
    array([[4, 9],
           [4, 7]])
    """
    own = (found == entries[:, None]) | (found < 0)
    order = np.argsort(own, axis=1, kind="stable")
    others = np.take_along_axis(np.where(own, -1, found), order, 1)
    return others[:, :-1]


def _save(array: NDArray[Any], path: Path) -> str:
    with durable_file(path) as file:
        np.save(file, array, allow_pickle=False)
    return file_sha256(path)
