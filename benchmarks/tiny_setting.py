"""A tiny model, a store and splits, made on the spot in some seconds."""

from pathlib import Path

import common  # noqa: F401, finds the package
import numpy as np
from scratch_model import ModelShape, init_model

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.splits import write_splits
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig

NOUNS = ["ticket", "event", "order", "seat", "price", "voucher", "guest", "door", "list", "mail"]
VERBS = ["open", "close", "check", "print", "change", "remove"]


def make_setting(folder: Path, seed: int) -> tuple[Path, Path, Path]:
    """A model of random weights, splits of some hundred sentences, and their datastore with an index.

    Returns:
        The folders of model, splits and datastore.
    """
    rng = np.random.default_rng(seed)
    drawn = {(rng.choice(VERBS), rng.choice(NOUNS), rng.choice(NOUNS), int(rng.integers(90))) for _ in range(460)}
    pairs = [Pair(f"{v} the {n} of {m} {i}", f"the {n} {i} of {m} {v}") for v, n, m, i in sorted(drawn)]
    pairs = [pairs[number] for number in rng.permutation(len(pairs))]
    model, data, store = folder / "model", folder / "data", folder / "store"
    shape = ModelShape(vocabulary=120, d_model=32, encoder_layers=1, decoder_layers=1, ffn=32, positions=64)
    init_model([text for pair in pairs for text in (pair.src, pair.tgt)], model, shape)
    write_splits(data, {"test": pairs[:24], "validation": pairs[24:48], "train": pairs[48:]}, {})
    loaded = load_model(str(model), device="cpu")
    build_datastore(loaded, DatastoreConfig(store, CorpusFile(data / "train.jsonl")))
    with Datastore(store) as built:
        build_index(built, IndexConfig("IVF8,PQ8x4fs,Refine(SQfp16)"))
    return model, data, store
