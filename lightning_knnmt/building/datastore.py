"""From a parallel corpus to a datastore, in one teacher-forced pass that can be stopped and continued at any time."""

import logging
from collections import deque
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any

from tqdm import tqdm

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.config import DatastoreConfig, Destination
from lightning_knnmt.building.encoder import Item, Tokenized, blocks_of, one_ahead, write_shard
from lightning_knnmt.data.readers import CorpusFile, MalformedCorpusError, ReadReport, msgid_side, read_pairs
from lightning_knnmt.datastore.manifest import Manifest, Provenance, ShardInfo, finish_building
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256, sync_folder
from lightning_knnmt.storage.layout import BUILDING, MANIFEST, remove_others
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.ranks import Ranks

__all__ = ["DatastoreBuild", "DatastoreConfig", "build_datastore", "corpus_sha256", "encode_rest"]

log = logging.getLogger(__name__)

ENCODING_LIBRARIES = ("torch", "transformers", "tokenizers", "h5py")  # another version may give other bytes


@dataclass(frozen=True)
class DatastoreBuild:
    """What building has led to.

    Attributes:
        manifest: Of the whole datastore.
        encoded: Entries that were encoded now, by all processes; what earlier runs have left is not counted.
        kept: Whether the whole datastore was there before.
        cut: Texts encoded now that were longer than the model's positions and were cut.
    """

    manifest: Manifest
    encoded: int
    kept: bool
    cut: int = 0


def build_datastore(model: KeyedModel, config: DatastoreConfig, ranks: Ranks = Ranks()) -> DatastoreBuild:
    """Write keys and values of every target token of a corpus.

    A datastore that is already there is kept if the same model, tokenizer, key type and corpus would make it again.
    One that was begun is continued after its last whole shard, which is one whose checksum fits: `building.json` is its
    manifest so far, and is renamed to `manifest.json` when nothing is missing. One that is replaced is gone from the
    moment encoding begins; only then is the corpus read through before, so that a malformed one shows in time.

    The corpus is read once. Several ranks write whole shards in turn, and each reads it and tokenizes the pairs of its
    own shards: which pairs a shard holds does not depend on how many ranks there are, so the bytes are those that one
    process writes, and another number of processes can continue.

    Args:
        model: Whose states become the keys.
        config: Corpus, folder and sizes.
        ranks: This process's place among those that build together, each of which calls this function.

    Returns:
        The whole datastore's manifest, and what was done.

    Raises:
        DatastoreError: The folder holds a datastore made from something else, another process writes to it, a file
            could not be written, or a key is not finite in fp16; also if this goes wrong for another rank.
        MalformedCorpusError: The corpus holds something that is no pair; what was encoded before it is kept.
    """
    folder = config.folder
    planned = Manifest(
        provenance=Provenance.of(model),
        corpus=config.corpus.path.name,
        corpus_sha256=corpus_sha256(config.corpus),
        reading=_reading(config.corpus),
        shard_entries=None,
        shards=(),
        encoding=_encoding(model, config),
        shard_pairs=config.shard_pairs,
    )
    for rank, other in enumerate(ranks.each(lambda: planned)):
        if differences := _differences(other, planned, to_the_bit=True):
            raise DatastoreError(f"process {rank} of this build has another model or corpus: {'; '.join(differences)}")

    find = partial(kept_datastore, planned, config)
    if (kept := ranks.first(find)) is not None:  # before the lock, since it may be in a folder for reading only
        return DatastoreBuild(kept, 0, kept=True)
    with only_writer(folder, ranks):
        if (kept := ranks.first(find)) is not None:  # another process has just made it
            return DatastoreBuild(kept, 0, kept=True)
        begun, replaces = ranks.first(lambda: begun_datastore(planned, config))

        def begin() -> None:
            if replaces:
                deque(read_pairs(config.corpus), maxlen=0)
            begun.save(folder, BUILDING)
            (folder / MANIFEST).unlink(missing_ok=True)
            sync_folder(folder)
            remove_others(folder, [shard.file for shard in begun.shards])

        ranks.first(begin)
        report = ReadReport()
        missing = islice(enumerate(model.split_pairs(read_pairs(config.corpus, report))), begun.pairs, None)
        own = (each for each in missing if (each[0] - begun.pairs) // config.shard_pairs % ranks.size == ranks.rank)
        tokenized = Tokenized(model, own)
        try:
            manifest = encode_rest(model, config, begun, blocks_of(tokenized, config.shard_pairs), ranks)
        except MalformedCorpusError:
            if ranks.rank == 0 and not Manifest.load(folder, BUILDING).shards:  # there is nothing to continue from
                (folder / BUILDING).unlink()
            raise
        ranks.first(lambda: finish_building(folder))
        cut_texts = sum(ranks.each(lambda: tokenized.cut))
    log.info("%s: %s", config.corpus.path, report)
    if 0 < len(manifest.shards) - len(begun.shards) < ranks.size:
        log.warning(
            "%d shards of up to %d pairs left some of %d processes idle; ask for fewer shard_pairs",
            len(manifest.shards) - len(begun.shards), config.shard_pairs, ranks.size,
        )  # fmt: skip
    log.info("%s: %d entries of %d pairs in %d shards", folder, manifest.entries, manifest.pairs, len(manifest.shards))
    return DatastoreBuild(manifest, manifest.entries - begun.entries, kept=False, cut=cut_texts)


def encode_rest(
    model: KeyedModel,
    config: DatastoreConfig,
    begun: Manifest,
    shards: Iterator[list[Item]],
    ranks: Ranks = Ranks(),
    total: int | None = None,
) -> Manifest:
    """Add the missing shards, of which each rank writes one in every round.

    Args:
        model: The model.
        config: Folder and sizes.
        begun: What there is; grows in `building.json`.
        shards: The pairs of each further shard that falls to this rank.
        ranks: This process's place.
        total: Pairs of the whole datastore, where that is known before they are read.
    """
    folder = config.folder
    label = f"encode {config.corpus.path.name}"

    def write_next() -> ShardInfo | None:
        if (items := next(ahead, None)) is None:
            return None
        path = folder / begun.next_shard(ranks.rank)
        write_shard(model, items, path, config.max_tokens, config.max_padding, progress.update)
        return ShardInfo(path.name, sum(len(item.tgt) for item in items), len(items), file_sha256(path))

    with (
        closing(one_ahead(shards)) as ahead,
        tqdm(total=total, initial=begun.pairs, desc=label, unit=" pairs", disable=ranks.rank > 0) as progress,
    ):
        while written := [info for info in ranks.each(write_next) if info is not None]:
            for info in written:
                begun = begun.with_shard(info)
            ranks.first(partial(begun.save, folder, BUILDING))
            progress.update(begun.pairs - progress.n)  # what the other ranks have done
    return begun


def kept_datastore(planned: Manifest, config: Destination) -> Manifest | None:
    """The whole datastore that makes building needless; None if there is none.

    Raises:
        DatastoreError: There is another one, which is not to be replaced.
    """
    folder = config.folder
    if not (folder / MANIFEST).exists():
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
            if existing.is_changed and not config.overwrite:
                raise DatastoreError(
                    f"{folder / shard.file} is missing or damaged, and pairs were appended or removed since the "
                    "datastore was built; restore the file, or set overwrite: true to build without these changes"
                )
            log.warning("%s is missing or damaged; it and the shards after it are made again", folder / shard.file)
            return None
    changed = ", changed since" if existing.is_changed else ""
    log.info("%s is already built from this model and corpus%s: %d entries", folder, changed, existing.entries)
    return existing


def begun_datastore(planned: Manifest, config: Destination) -> tuple[Manifest, bool]:
    """The plan with the whole shards that an earlier run of it has left, and whether others are to be replaced.

    Raises:
        DatastoreError: There are others, which are not to be replaced.
    """
    folder = config.folder
    replaces = (folder / MANIFEST).exists()
    for name in (BUILDING, MANIFEST):
        try:
            previous = Manifest.load(folder, name)
        except DatastoreError as error:
            if (folder / name).exists():
                log.warning("%s", error)
            continue
        if previous.is_changed:
            continue
        if differences := _differences(previous, planned, to_the_bit=True):
            _replace_only_if_asked(f"{folder} holds {len(previous.shards)} shards of another plan", differences, config)
            replaces = True
            continue
        whole = 0
        while whole < len(previous.shards) and previous.shards[whole].is_whole(folder):
            whole += 1
        log.info("%s: %d shards are there and are kept", folder, whole)
        return replace(planned, shards=previous.shards[:whole]), replaces
    return planned, replaces


def _replace_only_if_asked(what: str, differences: list[str], config: Destination) -> None:
    if not config.overwrite:
        raise DatastoreError(
            f"{what}: {'; '.join(differences)} (there against wanted). "
            "Choose another folder, or set overwrite: true to replace it."
        )


def corpus_sha256(corpus: CorpusFile) -> str:
    """Checksum of a corpus, of one file or two."""
    sums = [file_sha256(path) for path in (corpus.path, corpus.tgt_path) if path is not None]
    return "+".join(sums)


def _reading(corpus: CorpusFile) -> dict[str, Any]:
    side = msgid_side(corpus) if corpus.file_format in ("po", "mo") else "tgt" if corpus.msgid_side == "auto" else None
    names = ("src_lang", "tgt_lang", "msgid_side", "malformed", "max_characters")
    read = {"format": corpus.file_format, **{name: getattr(corpus, name) for name in names}}
    return read if side is None else read | {"msgid_side": side}


def _encoding(model: KeyedModel, config: DatastoreConfig) -> dict[str, Any]:
    sizes = {"max_tokens": config.max_tokens, "max_padding": config.max_padding}
    return {**sizes, "dtype": model.dtype, "device": model.device.type}


def _differences(existing: Manifest, planned: Manifest, to_the_bit: bool = False) -> list[str]:
    """In words, why two datastores are not the same, or, `to_the_bit`, why their shards cannot stand side by side."""
    differences = existing.provenance.differences(planned.provenance)
    if existing.corpus_sha256 != planned.corpus_sha256:
        differences.append(
            f"corpus {existing.corpus} ({existing.corpus_sha256[:12]}) "
            f"against {planned.corpus} ({planned.corpus_sha256[:12]})"
        )
    if existing.pruned != planned.pruned:
        differences.append(f"pruned {len(existing.pruned)} times against {len(planned.pruned)}")
    compared = [("corpus.", existing.reading, planned.reading)]
    if to_the_bit:
        if existing.shard_pairs != planned.shard_pairs:
            differences.append(f"shard_pairs {existing.shard_pairs} against {planned.shard_pairs}")
        libraries = {name: planned.libraries.get(name) for name in ENCODING_LIBRARIES}
        compared += [("", existing.encoding, planned.encoding), ("", existing.libraries, libraries)]
    for prefix, there, wanted in compared:
        differences += [
            f"{prefix}{name} {there.get(name)} against {value}"
            for name, value in wanted.items()
            if there.get(name) != value
        ]
    return differences
