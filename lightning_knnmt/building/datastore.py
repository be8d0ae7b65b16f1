"""From a parallel corpus to a datastore, in one teacher-forced pass that can be stopped and continued at any time."""

import logging
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.tokenization import token_ids
from lightning_knnmt.building.encoder import TOKENIZED_AT_ONCE, Item, cut, items_of, one_ahead, write_shard
from lightning_knnmt.building.leftovers import remove_leftovers
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, ReadReport, read_pairs
from lightning_knnmt.datastore.manifest import BUILDING, FILE_NAME, Manifest, Provenance, ShardInfo, finish_building
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256, sync_folder
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.ranks import Ranks

log = logging.getLogger(__name__)

ENCODING_LIBRARIES = ("torch", "transformers", "tokenizers", "h5py")  # another version may give other bytes


@dataclass(frozen=True)
class DatastoreConfig:
    """How a datastore is built.

    Attributes:
        folder: Where it goes.
        corpus: The parallel corpus; `train.jsonl` of `prepare_data.py`, or any format that the readers know.
        max_tokens: Most tokens of a batch on either side, padding counted.
        max_padding: Largest share of a shard's batches that may be padding; less makes more and smaller batches.
        shard_entries: Most entries of a shard, if one pair has no more; the sentences of two shards are held in memory.
        overwrite: Replace a datastore that was built from something else; otherwise that is an error.
    """

    folder: Path
    corpus: CorpusFile
    max_tokens: int = 8192
    max_padding: float = 0.04
    shard_entries: int = 1 << 20
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}, expected 1 or more")
        if not 0 <= self.max_padding <= 1:
            raise ValueError(f"max_padding is {self.max_padding}, expected 0 to 1")
        if self.shard_entries < 1:
            raise ValueError(f"shard_entries is {self.shard_entries}, expected 1 or more")


@dataclass(frozen=True)
class DatastoreBuild:
    """What building has led to.

    Attributes:
        manifest: Of the whole datastore.
        encoded: Entries that were encoded now, by all processes; what earlier runs have left is not counted.
        kept: Whether the whole datastore was there before.
    """

    manifest: Manifest
    encoded: int
    kept: bool


def build_datastore(backbone: KeyedModel, config: DatastoreConfig, ranks: Ranks = Ranks()) -> DatastoreBuild:
    """Write keys and values of every target token of a corpus.

    A datastore that is already there is kept if the same model, tokenizer, key type and corpus would make it again.
    One that was begun is continued after its last whole shard, which is one whose checksum fits: `building.json` is its
    manifest so far, and is renamed to `manifest.json` when nothing is missing. One that is replaced is gone from the
    moment encoding begins.

    Several ranks write whole shards in turn: which pairs a shard holds does not depend on how many there are, so the
    bytes are those that one process writes, and another number of processes can continue.

    Args:
        backbone: Whose states become the keys.
        config: Corpus, folder and sizes.
        ranks: This process's place among those that build together, each of which calls this function.

    Returns:
        The whole datastore's manifest, and what was done.

    Raises:
        DatastoreError: The folder holds a datastore made from something else, another process writes to it, a file
            could not be written, or a key is not finite in fp16; also if this goes wrong for another rank.
    """
    folder = config.folder
    planned = Manifest(
        provenance=Provenance.of(backbone),
        corpus=config.corpus.path.name,
        corpus_sha256=corpus_sha256(config.corpus),
        reading=_reading(config.corpus),
        shard_entries=config.shard_entries,
        shards=(),
        encoding=_encoding(backbone, config),
    )
    for rank, other in enumerate(ranks.each(lambda: planned)):
        if differences := _differences(other, planned, to_the_bit=True):
            raise DatastoreError(f"process {rank} of this build has another model or corpus: {'; '.join(differences)}")

    find = partial(_kept, planned, config)
    if (kept := ranks.first(find)) is not None:  # before the lock, since it may be in a folder for reading only
        return DatastoreBuild(kept, 0, kept=True)
    with only_writer(folder, ranks):
        if (kept := ranks.first(find)) is not None:  # another process has just made it
            return DatastoreBuild(kept, 0, kept=True)
        begun = ranks.first(lambda: _begun(planned, config))
        total, shards = _shards(backbone, config, begun.pairs, ranks)  # malformed input shows before anything is lost

        def begin() -> None:
            begun.save(folder, BUILDING)
            (folder / FILE_NAME).unlink(missing_ok=True)
            sync_folder(folder)
            remove_leftovers(folder, begun)

        ranks.first(begin)
        manifest = encode_rest(backbone, config, begun, total, shards, ranks)
        ranks.first(lambda: finish_building(folder))
    log.info("%s: %d entries of %d pairs in %d shards", folder, manifest.entries, manifest.pairs, len(manifest.shards))
    return DatastoreBuild(manifest, manifest.entries - begun.entries, kept=False)


def _shards(
    backbone: KeyedModel, config: DatastoreConfig, first: int, ranks: Ranks
) -> tuple[int, Iterator[list[Item]]]:
    """How many pairs the corpus has, and those of each shard, from the first pair on, that falls to this rank.

    One process cuts shards while it tokenizes. Several must know where shards begin before they can share them out.
    """
    report = ReadReport()
    if ranks.size == 1:
        total = sum(1 for _ in read_pairs(config.corpus, report))
        rest = items_of(backbone, islice(enumerate(read_pairs(config.corpus)), first, None))
        shards = cut(rest, lambda item: len(item.tgt), config.shard_entries)
    else:
        lengths = _target_lengths(backbone, islice(read_pairs(config.corpus, report), first, None), ranks)
        total = first + len(lengths)
        groups = cut(range(first, total), lambda number: int(lengths[number - first]), config.shard_entries)
        spans = [range(group[0], group[-1] + 1) for group in groups]
        if len(spans) < ranks.size:
            log.warning(
                "%d shards of up to %d entries leave some of %d processes idle; ask for fewer shard_entries",
                len(spans), config.shard_entries, ranks.size,
            )  # fmt: skip
        shards = _items_of_spans(backbone, read_pairs(config.corpus), spans[ranks.rank :: ranks.size])
    log.info("%s: %s", config.corpus.path, report)
    return total, shards


def _target_lengths(backbone: KeyedModel, pairs: Iterator[Pair], ranks: Ranks) -> NDArray[np.int32]:
    """Target tokens of each pair, to which every rank contributes blocks."""
    own = []
    for number, rows in enumerate(iter(lambda: list(islice(pairs, TOKENIZED_AT_ONCE)), [])):
        if number % ranks.size == ranks.rank:
            targets = [pair.tgt for pair in rows]
            tokens, _ = token_ids(backbone.tokenizer, "text_target", targets, backbone.position_limit)
            own.append(np.array([len(row) for row in tokens], np.int32))
    told = ranks.each(lambda: own)
    blocks = [told[number % ranks.size][number // ranks.size] for number in range(sum(map(len, told)))]
    return np.concatenate([np.empty(0, np.int32), *blocks])


def _items_of_spans(backbone: KeyedModel, pairs: Iterator[Pair], spans: list[range]) -> Iterator[list[Item]]:
    numbered, position = enumerate(pairs), 0
    for span in spans:
        yield list(items_of(backbone, islice(numbered, span.start - position, span.stop - position)))
        position = span.stop


def encode_rest(
    backbone: KeyedModel,
    config: DatastoreConfig,
    begun: Manifest,
    total: int,
    shards: Iterator[list[Item]],
    ranks: Ranks,
) -> Manifest:
    """Add the missing shards, of which each rank writes one in every round.

    Args:
        backbone: The model.
        config: Folder and sizes.
        begun: What there is; grows in `building.json`.
        total: Pairs of the whole datastore.
        shards: The pairs of each further shard that falls to this rank.
        ranks: This process's place.
    """
    folder = config.folder
    label = f"encode {config.corpus.path.name}"

    def write_next() -> ShardInfo | None:
        if (items := next(ahead, None)) is None:
            return None
        path = folder / begun.next_shard(ranks.rank)
        write_shard(backbone, items, path, config.max_tokens, config.max_padding, progress.update)
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
        if previous.is_changed:
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


def corpus_sha256(corpus: CorpusFile) -> str:
    """Checksum of a corpus, of one file or two."""
    sums = [file_sha256(path) for path in (corpus.path, corpus.tgt_path) if path is not None]
    return "+".join(sums)


def _reading(corpus: CorpusFile) -> dict[str, Any]:
    names = ("src_lang", "tgt_lang", "msgid_side", "malformed", "max_characters")
    return {"format": corpus.file_format, **{name: getattr(corpus, name) for name in names}}


def _encoding(backbone: KeyedModel, config: DatastoreConfig) -> dict[str, Any]:
    dtype = str(backbone.output_projection.weight.dtype).removeprefix("torch.")
    device = backbone.device.type
    return {"max_tokens": config.max_tokens, "max_padding": config.max_padding, "dtype": dtype, "device": device}


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
