"""Keys of a fine-tuned model from stored states: one pass of its trained part, without running the model."""

import logging
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import torch
from tqdm import tqdm

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.building.config import RekeyConfig
from lightning_knnmt.building.datastore import DatastoreBuild, begun_datastore, kept_datastore
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.manifest import Manifest, Provenance, ShardInfo, finish_building
from lightning_knnmt.datastore.shard import TEXTS, ShardWriter
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256, sync_folder
from lightning_knnmt.storage.layout import BUILDING, MANIFEST, remove_others
from lightning_knnmt.storage.lock import only_writer

log = logging.getLogger(__name__)

AT_ONCE = 16384  # states


@torch.inference_mode()
def rekey(model: KeyedModel, config: RekeyConfig) -> DatastoreBuild:
    """Write the datastore that a model would make of a corpus, from the states that its trained part begins with.

    Shards, pairs and values are those of the states. As with `build_datastore`, whose result for the same model and
    corpus this is but for the order and the last bits of keys, a whole datastore is kept, and one that was begun is
    continued after its last whole shard.

    Args:
        model: With `decoder_output` keys, fine-tuned from the model that made the states by what follows them.
        config: The states, and where the keys go.

    Raises:
        ValueError: The model's keys are others, or the states are not those of the model.
        DatastoreError: The states were changed or are damaged, the folder holds another datastore, or a key is not
            finite in fp16.
    """
    if model.config.key_type != "decoder_output" or not isinstance(model, PretrainedModel):
        raise ValueError(
            f"backbone.key_type is {model.config.key_type!r} of a {type(model).__name__}, expected "
            "'decoder_output' of a PretrainedModel"
        )
    states, folder = config.states, config.folder
    with Datastore(states) as store:
        provenance = Provenance.of(model)
        expected = replace(provenance, key_type="ffn_residual", model_sha256=model.frozen_fingerprint)
        if differences := store.manifest.provenance.differences(expected):
            raise ValueError(
                f"states is {states}, which does not fit the model {model.name}: {'; '.join(differences)} (states "
                "against model); expected the states of the model that it was fine-tuned from"
            )
        if store.manifest.is_changed or store.manifest.pruned:
            raise DatastoreError(f"{states} was changed since it was built; build the states again")
        encoding = {**store.manifest.encoding, "from": "ffn_residual"}
        planned = replace(store.manifest, provenance=provenance, shards=(), encoding=encoding)
        if (kept := kept_datastore(planned, config)) is not None:
            return DatastoreBuild(kept, 0, kept=True)
        with only_writer(folder):
            begun, _ = begun_datastore(planned, config)
            begun.save(folder, BUILDING)
            (folder / MANIFEST).unlink(missing_ok=True)
            sync_folder(folder)
            remove_others(folder, [shard.file for shard in begun.shards])
            manifest = _write_rest(model, store, begun, folder)
            finish_building(folder)
    log.info("%s: %d keys of %d pairs from %s", folder, manifest.entries, manifest.pairs, states)
    return DatastoreBuild(manifest, manifest.entries - begun.entries, kept=False)


def _write_rest(model: PretrainedModel, store: Datastore, begun: Manifest, folder: Path) -> Manifest:
    shards = list(zip(store.manifest.shards, store.shards, strict=True))[len(begun.shards) :]
    with tqdm(total=store.manifest.entries, initial=begun.entries, desc="keys", unit=" keys", unit_scale=True) as bar:
        for info, shard in shards:
            if not info.is_whole(store.folder):
                raise DatastoreError(f"{store.folder / info.file} is damaged (its checksum is another); build it again")
            path = folder / begun.next_shard()
            _write(model, shard.file, path, info, bar)
            begun = begun.with_shard(replace(info, file=path.name, sha256=file_sha256(path)))
            begun.save(folder, BUILDING)
    return begun


def _write(model: PretrainedModel, file: h5py.File, path: Path, info: ShardInfo, bar: "tqdm[None]") -> None:
    texts = (file[name].asstr()[:] for name in TEXTS)
    pairs, lengths = [Pair(*each) for each in zip(*texts, strict=True)], file["lengths"][:].tolist()
    numbers, values = file["numbers"][:].tolist(), file["values"][:]
    stops = np.cumsum(lengths)  # [pair -> entry after its last]
    blocks = np.unique(stops // AT_ONCE, return_index=True)[1][1:].tolist()
    with ShardWriter(path, info.entries, info.pairs, model.key_size) as writer:
        for first, last in pairwise([0, *blocks, len(pairs)]):  # pairs that have about as many entries together
            rows = slice(int(stops[first - 1]) if first else 0, int(stops[last - 1]))
            states = torch.from_numpy(file["keys"][rows]).to(model.device, getattr(torch, model.dtype))
            keys = model.outputs(states).to(torch.float16)
            if not keys.isfinite().all():
                raise DatastoreError("a key is NaN or beyond fp16's range (65504)")
            chosen = slice(first, last)
            writer.append(keys.cpu().numpy(), values[rows], lengths[chosen], pairs[chosen], numbers[chosen])
            bar.update(len(keys))
