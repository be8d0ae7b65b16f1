"""From a parallel corpus to a datastore, in one teacher-forced pass that can be stopped and continued at any time."""

import logging
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.data.readers import CorpusFile, ReadReport, read_pairs
from lightning_knnmt.datastore.encoder import items_of_shards, write_shard
from lightning_knnmt.datastore.errors import DatastoreError
from lightning_knnmt.datastore.files import file_sha256, sync_folder
from lightning_knnmt.datastore.lock import only_writer
from lightning_knnmt.datastore.manifest import (
    BUILDING,
    FILE_NAME,
    Manifest,
    Provenance,
    ShardInfo,
    finish_building,
    remove_other_shards,
    shard_name,
)

log = logging.getLogger(__name__)

ENCODING_LIBRARIES = ("torch", "transformers", "tokenizers", "h5py")  # another version may give other bytes


@dataclass(frozen=True)
class DatastoreConfig:
    """How a datastore is built.

    Attributes:
        folder: Where it goes.
        corpus: The parallel corpus; `train.jsonl` of `prepare_data.py`, or any format that the readers know.
        max_tokens: Most tokens of a batch on either side, padding counted.
        shard_entries: Most entries of a shard, if one pair has no more; the sentences of one shard are held in memory.
        overwrite: Replace a datastore that was built from something else; otherwise that is an error.
    """

    folder: Path
    corpus: CorpusFile
    max_tokens: int = 8192
    shard_entries: int = 1 << 20
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected 1 or more")
        if self.shard_entries < 1:
            raise ValueError(f"shard_entries is {self.shard_entries}, expected 1 or more")


def build_datastore(backbone: Backbone, config: DatastoreConfig) -> Manifest:
    """Write keys and values of every target token of a corpus.

    A datastore that is already there is kept if the same model, tokenizer, key type and corpus would make it again.
    One that was begun is continued after its last whole shard, which is one whose checksum fits: `building.json` is its
    manifest so far, and is renamed to `manifest.json` when nothing is missing. One that is replaced is gone from the
    moment encoding begins.

    Args:
        backbone: Whose states become the keys.
        config: Corpus, folder and sizes.

    Returns:
        The manifest of the whole datastore.

    Raises:
        DatastoreError: The folder holds a datastore made from something else, another process writes to it, a file
            could not be written, or a key is not finite in fp16.
    """
    folder = config.folder
    planned = Manifest(
        provenance=Provenance.of(backbone),
        corpus=config.corpus.path.name,
        corpus_sha256=_corpus_sha256(config.corpus),
        reading=_reading(config.corpus),
        shard_entries=config.shard_entries,
        shards=(),
        encoding=_encoding(backbone, config),
    )
    if (kept := _kept(planned, config)) is not None:  # before the lock, since it may be in a folder for reading only
        return kept
    with only_writer(folder):
        if (kept := _kept(planned, config)) is not None:  # another process has just made it
            return kept
        begun = _begun(planned, config)
        total = sum(1 for _ in read_pairs(config.corpus))  # malformed input shows before anything is lost or begun
        begun.save(folder, BUILDING)
        (folder / FILE_NAME).unlink(missing_ok=True)
        sync_folder(folder)
        remove_other_shards(folder, begun.shards)
        manifest = _encode_rest(backbone, config, begun, total)
        finish_building(folder)
    log.info("%s: %d entries of %d pairs in %d shards", folder, manifest.entries, manifest.pairs, len(manifest.shards))
    return manifest


def _encode_rest(backbone: Backbone, config: DatastoreConfig, begun: Manifest, total: int) -> Manifest:
    """Add the shards of the pairs that are in none yet."""
    folder, report = config.folder, ReadReport()
    rest = islice(enumerate(read_pairs(config.corpus, report)), begun.pairs, None)
    label = f"encode {config.corpus.path.name}"
    with tqdm(total=total, initial=begun.pairs, desc=label, unit=" pairs") as progress:
        for items in items_of_shards(backbone, rest, config.shard_entries):
            path = folder / shard_name(len(begun.shards))
            write_shard(backbone, items, path, config.max_tokens, progress.update)
            entries = sum(len(item.tgt) for item in items)
            begun = begun.with_shard(ShardInfo(path.name, entries, len(items), file_sha256(path)))
            begun.save(folder, BUILDING)
            del items  # or two shards of pairs would be in memory while the next is read
    log.info("%s: %s", config.corpus.path, report)
    return begun


def _kept(planned: Manifest, config: DatastoreConfig) -> Manifest | None:
    """The whole datastore that makes building needless; None if there is none."""
    folder = config.folder
    if not (folder / FILE_NAME).exists():
        return None
    try:
        existing = Manifest.load(folder)
    except DatastoreError as error:
        _replace_only_if_asked(f"{folder} already holds another datastore", [str(error)], config)
        return None
    if differences := _differences(existing, planned):
        _replace_only_if_asked(f"{folder} already holds another datastore", differences, config)
        return None
    for shard in existing.shards:
        if not shard.is_whole(folder):
            log.warning("%s is missing or damaged; it and the shards after it are made again", folder / shard.file)
            return None
    log.info("%s is already built from this model and corpus: %d entries", folder, existing.entries)
    return existing


def _begun(planned: Manifest, config: DatastoreConfig) -> Manifest:
    """The plan with the whole shards that an earlier run of it has left."""
    folder = config.folder
    for name in (BUILDING, FILE_NAME):
        try:
            previous = Manifest.load(folder, name)
        except DatastoreError as error:
            if (folder / name).exists():
                log.warning("%s", error)
            continue
        if differences := _differences(previous, planned, to_the_bit=True):
            _replace_only_if_asked(f"{folder} holds {len(previous.shards)} shards of another plan", differences, config)
            continue
        whole = 0
        while whole < len(previous.shards) and previous.shards[whole].is_whole(folder):
            whole += 1
        log.info("%s: %d shards are there and are kept", folder, whole)
        return replace(planned, shards=previous.shards[:whole])
    return planned


def _replace_only_if_asked(what: str, differences: list[str], config: DatastoreConfig) -> None:
    if not config.overwrite:
        raise DatastoreError(
            f"{what}: {'; '.join(differences)} (there against wanted). "
            "Choose another folder, or set overwrite: true to replace it."
        )


def _corpus_sha256(corpus: CorpusFile) -> str:
    sums = [file_sha256(path) for path in (corpus.path, corpus.tgt_path) if path is not None]
    return "+".join(sums)


def _reading(corpus: CorpusFile) -> dict[str, Any]:
    names = ("src_lang", "tgt_lang", "msgid_side", "malformed", "max_characters")
    return {"format": corpus.file_format, **{name: getattr(corpus, name) for name in names}}


def _encoding(backbone: Backbone, config: DatastoreConfig) -> dict[str, Any]:
    dtype = str(backbone.output_projection.weight.dtype).removeprefix("torch.")
    return {"max_tokens": config.max_tokens, "dtype": dtype, "device": backbone.device.type}


def _differences(existing: Manifest, planned: Manifest, to_the_bit: bool = False) -> list[str]:
    """In words, why two datastores are not the same, or, `to_the_bit`, why their shards cannot stand side by side."""
    differences = existing.provenance.differences(planned.provenance)
    if existing.corpus_sha256 != planned.corpus_sha256:
        differences.append(
            f"corpus {existing.corpus} ({existing.corpus_sha256[:12]}) "
            f"against {planned.corpus} ({planned.corpus_sha256[:12]})"
        )
    compared = [("corpus.", existing.reading, planned.reading)]
    if to_the_bit:
        if existing.shard_entries != planned.shard_entries:
            differences.append(f"shard_entries {existing.shard_entries} against {planned.shard_entries}")
        libraries = {name: planned.libraries.get(name) for name in ENCODING_LIBRARIES}
        compared += [("", existing.encoding, planned.encoding), ("", existing.libraries, libraries)]
    for prefix, there, wanted in compared:
        differences += [
            f"{prefix}{name} {there.get(name)} against {value}"
            for name, value in wanted.items()
            if there.get(name) != value
        ]
    return differences
