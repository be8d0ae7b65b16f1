"""Datastores that benchmarks make for themselves, and exact search in any."""

import hashlib
from pathlib import Path

import common  # noqa: F401, finds the package
import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore, Manifest, Provenance, ShardInfo
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import MANIFEST, shard_file

CHUNK = 1 << 15


def make_store(folder: Path, entries: int, key_size: int, vocabulary: int, rng: np.random.Generator) -> Datastore:
    """A datastore of clumpy keys whose tokens are as skewed as words are."""
    values = (rng.zipf(1.2, entries) % vocabulary).astype(np.int32)
    centers = rng.normal(size=(512, key_size))
    keys = (2 * centers[values % 512] + rng.normal(size=(entries, key_size))).astype(np.float16)
    path = folder / "shard-00000.h5"
    with ShardWriter(path, entries, 1, key_size) as writer:
        writer.append(keys, values, [entries], [Pair("source", "target")], [0])
    provenance = Provenance("benchmark", "0" * 64, "0" * 64, "decoder_output", key_size, None, None)
    shard = ShardInfo(path.name, entries, 1, file_sha256(path))
    Manifest(provenance, "benchmark", "0" * 64, {}, None, (shard,)).save(folder)
    return Datastore(folder)


class Clumps:
    """A mixture with what makes decoder states hard to index: frequent tokens and contexts in dense clumps.

    A key is its token's center, and beside it one of 1,024 contexts and noise. Tokens and contexts are as skewed as
    words are (Zipf); the centers of a family of 8 tokens lie close enough to be confused; norms and spreads vary from
    token to token (log-normal); the variance of contexts and noise decays over rotated dimensions.

    Args:
        key_size: D.
        vocabulary: V.
        seed: Of the mixture and of what is drawn from it.
    """

    def __init__(self, key_size: int, vocabulary: int = 8192, seed: int = 1) -> None:
        rng = np.random.default_rng([seed, 0])
        self.key_size, self.seed = key_size, seed
        self.description = f"Zipf clumps, D {key_size}, V {vocabulary}, seed {seed}"
        self._tokens = _zipf(vocabulary)
        families = rng.normal(size=(max(1, vocabulary // 8), key_size))
        centers = families[rng.integers(len(families), size=vocabulary)]
        centers += 0.5 * rng.normal(size=centers.shape)
        norms = np.exp(0.4 * rng.normal(size=(vocabulary, 1)))
        self._centers = (norms * centers).astype(np.float32)
        self._spreads = (0.7 * norms * np.exp(0.5 * rng.normal(size=norms.shape))).astype(np.float32)
        scales = np.arange(1, key_size + 1) ** -0.5
        rotation = np.linalg.qr(rng.normal(size=(key_size, key_size)))[0]
        self._noise = (scales / np.sqrt(np.mean(scales**2)) * rotation).astype(np.float32)
        self._contexts = rng.normal(size=(1024, key_size)).astype(np.float32) @ self._noise
        self._context_shares = _zipf(len(self._contexts))

    def draw(self, size: int, number: int) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
        """Keys of shape (N, D) and tokens of shape (N,); another `number` draws others."""
        rng = np.random.default_rng([self.seed, 1 + number])
        tokens = np.searchsorted(self._tokens, rng.random(size)).astype(np.int32)
        contexts = self._contexts[np.searchsorted(self._context_shares, rng.random(size))]
        noise = rng.standard_normal((size, self.key_size), np.float32) @ self._noise
        keys = self._centers[tokens] + self._spreads[tokens] * (0.8 * contexts + 0.6 * noise)
        return keys.astype(np.float16), tokens

    def queries(self, size: int) -> NDArray[np.float32]:
        """Keys that no datastore holds, shape (R, D)."""
        return self.draw(size, 1 << 40)[0].astype(np.float32)


def _zipf(size: int) -> NDArray[np.float64]:
    """Cumulative shares of words by rank."""
    shares = np.cumsum(1 / np.arange(1, size + 1))
    return shares / shares[-1]


def synthetic_store(folder: Path, clumps: Clumps, entries: int, shard_entries: int | None = None) -> Datastore:
    """A datastore of clumps in several shards, written chunk by chunk, unless it is there already."""
    shard_entries = shard_entries or min(1 << 20, -(-entries // 4))
    sha256 = hashlib.sha256(clumps.description.encode()).hexdigest()
    provenance = Provenance(clumps.description, sha256, sha256, "decoder_output", clumps.key_size, None, None)
    if (folder / MANIFEST).exists():
        manifest = Manifest.load(folder)
        if (manifest.provenance, manifest.entries, manifest.shards[0].entries) == (provenance, entries, shard_entries):
            return Datastore(folder)
        raise ValueError(f"{folder} holds another datastore, {manifest.provenance.model}; choose another --folder")
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, first in enumerate(range(0, entries, shard_entries)):
        stop = min(entries, first + shard_entries)
        starts = range(first, stop, CHUNK)
        path = folder / shard_file(number)
        with ShardWriter(path, stop - first, len(starts), clumps.key_size) as writer:
            for start in starts:
                keys, values = clumps.draw(min(CHUNK, stop - start), start)
                writer.append(keys, values, [len(keys)], [Pair("source", "target")], [start])
        shards.append(ShardInfo(path.name, stop - first, len(starts), file_sha256(path)))
    Manifest(provenance, "synthetic", sha256, {}, None, tuple(shards)).save(folder)
    return Datastore(folder)


def exact_neighbors(
    store: Datastore, queries: NDArray[np.float32], k: int, chunk: int = CHUNK
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Squared L2 distances and entries of the k nearest keys by brute force, shapes (R, min(k, N)), nearest first.

    Entries that were removed are none. Products of matrices only find twice as many candidates in each chunk; their
    distances are summed directly.
    """
    distances, ids = np.empty((len(queries), 0), np.float32), np.empty((len(queries), 0), np.int64)
    start = 0
    for stored in store.key_chunks(chunk):
        entries = np.arange(start, start + len(stored))
        start += len(stored)
        kept = ~store.removed.covers(entries)
        keys, entries = stored[kept].astype(np.float32), entries[kept]
        if not len(keys):
            continue
        candidates = faiss.knn(queries, keys, min(2 * k, len(keys)))[1]
        exact = np.stack([((keys[row] - query) ** 2).sum(1) for query, row in zip(queries, candidates, strict=True)])
        distances, ids = np.concatenate([distances, exact], 1), np.concatenate([ids, entries[candidates]], 1)
        order = np.argsort(distances, axis=1, kind="stable")[:, :k]
        distances, ids = np.take_along_axis(distances, order, 1), np.take_along_axis(ids, order, 1)
    return distances, ids
