"""A memory from two lists of strings."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.keyed_model import KeyedModel, TokenIds
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.checks import check_texts
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.datastore import Datastore, Provenance
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.memory import DatastoreMemory, open_memory
from lightning_knnmt.metric import Metric

BATCH_TOKENS = 4096  # most tokens of a batch on either side, padding counted


def build_memory(
    model: KeyedModel,
    sources: Sequence[str],
    targets: Sequence[str],
    folder: Path | str | None = None,
    index: IndexConfig = IndexConfig(),
) -> RamMemory | DatastoreMemory:
    """Store what a model would have to predict in some translations: a key and a value for every target token.

    Args:
        model: Whose states become the keys.
        sources: Source texts.
        targets: Their translations.
        folder: Where a datastore goes that is searched by an index; None: keys stay in RAM and are searched exactly.
        index: The datastore's index; of a memory in RAM, only its metric counts.

    Raises:
        TypeError: A string is given in place of a list.
        ValueError: The lists differ in length, or a translation is empty.
        DatastoreError: The folder holds another datastore.

    >>> memory = build_memory(load_model(tiny_model), ["Öffnen"], ["Open"])
    >>> memory.context(0).pair.tgt
    'Open'
    """
    check_texts(sources=sources, targets=targets)
    if len(sources) != len(targets):
        raise ValueError(f"there are {len(sources)} sources and {len(targets)} targets, expected as many of each")
    if empty := [number for number, target in enumerate(targets) if not target.strip()]:
        raise ValueError(f"targets has an empty text at {empty[0]}, expected a translation of every source")
    pairs = list(model.split_pairs(Pair(src, tgt) for src, tgt in zip(sources, targets, strict=True)))
    return _in_ram(model, pairs, index.metric) if folder is None else _on_disk(model, pairs, Path(folder), index)


@torch.inference_mode()
def _in_ram(model: KeyedModel, pairs: list[Pair], metric: Metric) -> RamMemory:
    ids = model.tokenize([pair.src for pair in pairs], [pair.tgt for pair in pairs]) if pairs else TokenIds([], [], 0)
    lengths = [len(row) for row in ids.tgt]
    longer = [max(len(src), len(tgt)) for src, tgt in zip(ids.src, ids.tgt, strict=True)]
    keys = [torch.empty(0, model.key_size, dtype=torch.float16, device=model.device)] * (len(pairs) + 1)
    for numbers in token_budget_batches(longer, BATCH_TOKENS):
        batch = collate([ids.src[n] for n in numbers], [ids.tgt[n] for n in numbers], model.pad_id).to(model.device)
        for number, states in zip(numbers, model.keys(batch), strict=True):
            keys[number] = states[: lengths[number]].to(torch.float16)
    stored = torch.cat(keys)
    if not stored.isfinite().all():
        raise ValueError("a key is too large for float16; use the other key_type")
    values = torch.tensor([token for row in ids.tgt for token in row], dtype=torch.long, device=model.device)
    return RamMemory(stored, values, pairs, lengths, Provenance.of(model), metric=metric)


def _on_disk(model: KeyedModel, pairs: list[Pair], folder: Path, index: IndexConfig) -> DatastoreMemory:
    with tempfile.TemporaryDirectory() as scratch:
        corpus = Path(scratch) / "pairs.jsonl"
        lines = (json.dumps({"src": pair.src, "tgt": pair.tgt}, ensure_ascii=False) for pair in pairs)
        corpus.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        build_datastore(model, DatastoreConfig(folder, CorpusFile(corpus)))
    with Datastore(folder) as store:
        build_index(store, index)
    return open_memory(folder, index.name)
