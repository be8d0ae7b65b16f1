"""A datastore without the entries that a rule drops, in a folder of its own."""

import logging
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.copying import Copying, check_whole
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.pruning.gathering import CHUNK, Gathering
from lightning_knnmt.building.pruning.rules import PruningRule
from lightning_knnmt.datastore.manifest import Manifest, PrunedInfo, finish_building
from lightning_knnmt.datastore.store import Datastore
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import BUILDING, MANIFEST, remove_others
from lightning_knnmt.storage.lock import only_writer

log = logging.getLogger(__name__)

EVIDENCE = "pruning"  # folder in the new datastore's, while it is made


@dataclass(frozen=True)
class Pruned:
    """What pruning has led to.

    Attributes:
        manifest: Of the smaller datastore; the last of its `pruned` says what was dropped and why.
        index: The description of its index.
    """

    manifest: Manifest
    index: IndexReport


def prune(
    folder: Path,
    out: Path,
    rule: PruningRule,
    model: KeyedModel | None = None,
    index: IndexConfig = IndexConfig(),
    searched: str = "index",
    nprobe: int = 8,
    chunk: int = CHUNK,
) -> Pruned:
    """Write the entries of a datastore that a rule keeps into a new one, and index them.

    Keys are copied, not encoded again; the datastore itself is only read. Entries keep order, texts and
    positions. A run that is stopped goes on where it was: neighbors that were searched and shards that were written are
    kept.

    Args:
        folder: The datastore.
        out: Folder of the new one.
        rule: Which entries are dropped.
        model: The model that the datastore was built with, where the rule asks for it.
        index: The new datastore's index.
        searched: Name of the datastore's index in which the rule's neighbors are searched.
        nprobe: Inverted lists that each of these searches scans.
        chunk: Entries whose neighbors are kept together for a run that goes on.

    Returns:
        The new datastore's manifest and index.

    Raises:
        ValueError: The rule needs a model and there is none, or the folders are the same.
        DatastoreError: The datastore or its index is damaged, does not fit the model, or `out` holds another one.
    """
    if rule.asks_model and model is None:
        raise ValueError(
            f"backbone is missing, expected the datastore's model: {type(rule).__name__} asks what it predicts"
        )
    if folder.resolve() == out.resolve():
        raise ValueError(f"out is {out}, the datastore itself, expected another folder")
    with Datastore(folder) as store:
        if model is not None:
            store.check(model)
            if rule.asks_model and store.manifest.provenance.key_type != "decoder_output":
                raise ValueError(
                    f"key_type is {store.manifest.provenance.key_type}, expected decoder_output: from other keys "
                    f"{type(rule).__name__} cannot tell what the model predicts"
                )
        removed = store.manifest.removed
        plan = PrunedInfo(
            type(rule).__name__, rule.options, store.fingerprint, None if removed is None else removed.sha256, 0, {}, 0
        )
        with only_writer(out):
            if (manifest := _kept(out, plan)) is None:
                manifest = _write(store, out, _Plan(rule, model, searched, nprobe, chunk), plan)
            Gathering(store, out / EVIDENCE).clear()
    with Datastore(out) as made:
        return Pruned(manifest, build_index(made, index))


@dataclass(frozen=True)
class _Plan:
    rule: PruningRule
    model: KeyedModel | None
    searched: str
    nprobe: int
    chunk: int


def _kept(out: Path, plan: PrunedInfo) -> Manifest | None:
    """The whole datastore that makes pruning needless; None if there is none."""
    if not (out / MANIFEST).exists():
        return None
    existing = Manifest.load(out)
    if not existing.pruned or existing.pruned[-1].plan != plan.plan or existing.is_changed:
        raise DatastoreError(f"{out} already holds another datastore; choose another folder")
    if damaged := [shard.file for shard in existing.shards if not shard.is_whole(out)]:
        raise DatastoreError(f"{out / damaged[0]} is missing or damaged; remove {out} and prune again")
    log.info("%s is already pruned from this datastore: %d entries", out, existing.entries)
    return existing


def _write(store: Datastore, out: Path, how: _Plan, plan: PrunedInfo) -> Manifest:
    """Decide, and copy what is kept; whole shards that an earlier run has left stay."""
    check_whole(store)
    gathering = Gathering(store, out / EVIDENCE, how.chunk)
    decision = how.rule.decide(gathering.evidence(how.rule, how.model, how.searched, how.nprobe))
    kept, weights = np.zeros(len(store), bool), np.ones(len(store), np.int32)
    kept[gathering.there], weights[gathering.there] = decision.kept, decision.weights
    copying = Copying(store, kept, weights)
    pairs = sum(len(rows) for rows in copying.groups())
    before = sum(int(shard.kept.sum()) for shard in store.shards)
    dropped = int(gathering.there.sum() - kept.sum())
    info = replace(
        plan, entries=int(gathering.there.sum()), pairs=before - pairs,
        dropped={decision.reason: dropped} if dropped else {},
    )  # fmt: skip
    if not kept.any():
        raise ValueError(f"{type(how.rule).__name__} leaves no entry of {info.entries}, expected one or more")
    planned = replace(store.manifest, shards=(), generation=0, removed=None, pruned=(*store.manifest.pruned, info))
    begun = _begun(out, planned)
    begun.save(out, BUILDING)
    remove_others(out, [shard.file for shard in begun.shards])
    with tqdm(total=int(kept.sum()), desc="copy", unit=" entries", unit_scale=True) as progress:
        for number, rows in enumerate(copying.groups()):
            if number >= len(begun.shards):
                begun = begun.with_shard(copying.write(out / begun.next_shard(), rows))
                begun.save(out, BUILDING)
            progress.update(sum(row[2] for row in rows))
    finish_building(out)
    return begun


def _begun(out: Path, planned: Manifest) -> Manifest:
    """The plan with the whole shards that an earlier run of it has left."""
    if not (out / BUILDING).exists():
        return planned
    try:
        previous = Manifest.load(out, BUILDING)
    except DatastoreError as error:
        log.warning("%s", error)
        return planned
    if replace(previous, shards=()) != planned:
        raise DatastoreError(f"{out} holds an unfinished datastore of another plan; choose another folder")
    for shard in previous.shards:
        if not shard.is_whole(out):
            break
        planned = planned.with_shard(shard)
    return planned
