"""A store of old pairs with an index of every family, new pairs to append, and what is found in it."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
from tiny_stores import build_store, corpus_pairs, write_corpus

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.datastore import DatastoreConfig
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.shard import TEXTS
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index

OLD, NEW = corpus_pairs(40), [replace(pair, src=f"neu {pair.src}") for pair in corpus_pairs(15, seed=1)]
K = 12
FACTORIES = {
    "flat": IndexConfig("Flat"),
    "ivf": IndexConfig("IVF4,Flat"),
    "fast": IndexConfig("IVF4,PQ4x4fs,Refine(SQfp16)"),
    "graph": IndexConfig("HNSW16"),
    "parts": IndexConfig("IVF4,SQ8", layout="shards", part_entries=80),
}


def make_built(backbone: KeyedModel, folder: Path) -> Path:
    """A store of the old pairs with an index of every family."""
    with build_store(backbone, folder, OLD, shard_pairs=4) as store:
        for name, config in FACTORIES.items():
            build_index(store, replace(config, name=name))
    return folder


def make_grown(backbone: KeyedModel, built: Path, folder: Path) -> Path:
    """A copy of it with the new pairs appended."""
    shutil.copytree(built, folder)
    change = append_pairs(backbone, appending(folder))
    assert (change.pairs, change.known) == (len(NEW), 0)
    return folder


def appending(folder: Path, pairs: list[Pair] = NEW) -> DatastoreConfig:
    corpus = write_corpus(folder.parent / "new.jsonl", pairs)
    return DatastoreConfig(folder, corpus, max_tokens=128, shard_pairs=4)


def queries(store: Datastore) -> np.ndarray:
    """Near the stored keys, so that every one of them is somebody's neighbor."""
    keys = np.concatenate(list(store.key_chunks()))[:: max(1, len(store) // 60)].astype(np.float32)
    return keys + np.random.default_rng(0).normal(scale=0.05, size=keys.shape).astype(np.float32)


def found(store: Datastore, name: str, asked: np.ndarray, k: int = K) -> list[dict[tuple[Pair, int], float]]:
    """(pair, position) -> distance of the neighbors of each query, all lists searched."""
    index = open_index(store, name)
    places = []
    for shard in store.shards:
        texts = zip(*(shard.file[text].asstr()[:] for text in TEXTS), strict=True)
        for each, entries in zip(texts, np.diff(shard.starts), strict=True):
            places += [(Pair(*each), position) for position in range(entries)]
    return [
        {places[entry]: float(distance) for distance, entry in zip(near, ids, strict=True) if entry >= 0}
        for near, ids in zip(*index.search(asked, k, nprobe=1000), strict=True)
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "writer.lock"}
