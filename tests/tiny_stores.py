"""Datastores for tests: written by hand from given keys, or built with a tiny model."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tiny_models import ENGLISH, GERMAN

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.datastore import Datastore, Manifest, Provenance, ShardInfo
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.storage.files import file_sha256


def corpus_pairs(size: int, seed: int = 0) -> list[Pair]:
    """Pairs of one to four words, of different lengths, none longer than a tiny model's positions."""
    rng = np.random.default_rng(seed)
    pairs = []
    for number in range(size):
        row, words = rng.integers(0, len(GERMAN)), rng.integers(1, 5)
        src, tgt = (" ".join(side[row].split()[:words]) for side in (GERMAN, ENGLISH))
        pairs.append(Pair(f"{number} {src}", tgt, f"page-{number % 3}"))
    return pairs


def write_corpus(path: Path, pairs: Sequence[Pair]) -> CorpusFile:
    """A JSONL corpus."""
    lines = (json.dumps({"src": p.src, "tgt": p.tgt, "document": p.document}, ensure_ascii=False) for p in pairs)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return CorpusFile(path)


def build_store(backbone: KeyedModel, folder: Path, pairs: Sequence[Pair], shard_pairs: int = 1 << 14) -> Datastore:
    """A datastore of some pairs, open."""
    folder.mkdir(parents=True)
    corpus = write_corpus(folder / "corpus.jsonl", pairs)
    build_datastore(backbone, DatastoreConfig(folder, corpus, max_tokens=128, shard_pairs=shard_pairs))
    return Datastore(folder)


def write_store(
    folder: Path, keys: NDArray[np.float16], values: NDArray[np.int32], shard_sizes: Sequence[int] | None = None
) -> Datastore:
    """A datastore of given keys of shape (N, D) in shards of given sizes, each entry a sentence of its own, open."""
    sizes = [len(keys)] if shard_sizes is None else list(shard_sizes)
    assert sum(sizes) == len(keys)
    folder.mkdir(parents=True)
    shards = []
    start = 0
    for number, size in enumerate(sizes):
        path, rows = folder / f"shard-{number:05d}.h5", range(start, start + size)
        with ShardWriter(path, size, size, keys.shape[1]) as writer:
            pairs = [Pair(f"source {row}", f"target {row}") for row in rows]
            part = slice(rows.start, rows.stop)
            writer.append(keys[part], values[part], [1] * size, pairs, list(rows))
        shards.append(ShardInfo(path.name, size, size, file_sha256(path)))
        start += size
    provenance = Provenance("by hand", "0" * 64, "1" * 64, "decoder_output", keys.shape[1], None, None)
    Manifest(provenance, "none", file_sha256(folder / shards[0].file), {}, None, tuple(shards)).save(folder)
    return Datastore(folder)


def clumpy_keys(entries: int, key_size: int, seed: int = 0) -> tuple[NDArray[np.float16], NDArray[np.int32]]:
    """Keys around 40 centers of very different weight, and tokens that follow the centers for the most part."""
    rng = np.random.default_rng(seed)
    weights = 1 / np.arange(1, 41)
    centers = rng.choice(40, entries, p=weights / weights.sum())
    keys = 3 * rng.normal(size=(40, key_size))[centers] + rng.normal(size=(entries, key_size))
    values = np.where(rng.random(entries) < 0.7, centers, rng.integers(0, 40, entries))
    return keys.astype(np.float16), values.astype(np.int32)


def by_place(store: Datastore, pairs: Sequence[Pair]) -> dict[tuple[int, int], tuple[int, NDArray[np.float16]]]:
    """(pair's number, position) -> value and key of every entry of a datastore of those pairs."""
    keys = np.concatenate(list(store.key_chunks(50)))
    found = {}
    for entry in range(len(store)):
        context = store.context(entry)
        assert context.pair == pairs[context.number]
        found[context.number, context.position] = (int(store.values[entry]), keys[entry])
    assert len(found) == len(store)
    return found


def numbered_store(folder: Path, sizes: list[int]) -> Datastore:
    """A store whose keys spell the entries' numbers."""
    numbers = np.arange(sum(sizes))
    keys = np.stack([numbers // 1000, numbers % 1000], 1).astype(np.float16)
    return write_store(folder, keys, (numbers % 17).astype(np.int32), sizes)


def harm_file(path: Path, harm: str) -> None:
    """Remove a file, cut it in half, or change its last bytes."""
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-50] + bytes(50))
