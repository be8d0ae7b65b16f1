"""New pairs of a corpus, encoded into further shards of a datastore."""

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.datastore import DatastoreConfig, corpus_sha256, encode_rest
from lightning_knnmt.building.encoder import cut, items_of
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, ReadReport, read_pairs
from lightning_knnmt.datastore.manifest import BUILDING, AppendedCorpus, Manifest, remove_other_shards
from lightning_knnmt.datastore.store import Datastore
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.ranks import Ranks

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class NewPairs:
    """What a corpus adds to a datastore.

    Attributes:
        manifest: Of the datastore with them.
        pairs: Pairs that were not stored.
        known: Pairs that were, or that the corpus itself repeats.
    """

    manifest: Manifest
    pairs: int
    known: int


def encode_new(backbone: KeyedModel, config: DatastoreConfig, store: Datastore) -> NewPairs:
    """Write the pairs of a corpus that a datastore lacks into further shards, and say so in `building.json`.

    An earlier run that was stopped is continued after its last whole shard. Nothing that the datastore has is touched.

    Args:
        backbone: The model that the datastore was built with.
        config: Corpus, and sizes of batches and shards.
        store: The datastore, to which nobody else writes.

    Raises:
        DatastoreError: A file could not be written, or a key is not finite in fp16.
    """
    report = ReadReport()
    new = {_digest(pair) for pair in read_pairs(config.corpus, report)}
    log.info("%s: %s", config.corpus.path, report)
    for shard in store.shards:
        for pair in shard.pairs():
            new.discard(_digest(pair))
    before, pairs = store.manifest, len(new)
    if not pairs:
        return NewPairs(before, 0, report.read)
    first = 1 + max((int(shard.file["numbers"][:].max(initial=-1)) for shard in store.shards), default=-1)
    corpus = AppendedCorpus(config.corpus.path.name, corpus_sha256(config.corpus), first, pairs)
    planned = replace(before, generation=before.generation + 1, appended=(*before.appended, corpus))
    begun = _begun(store.folder, planned)
    begun.save(store.folder, BUILDING)
    remove_other_shards(store.folder, begun.shards)
    rest = islice(_numbered(config.corpus, new, first), begun.pairs - before.pairs, None)
    shards = cut(items_of(backbone, rest), lambda item: len(item.tgt), config.shard_entries)
    manifest = encode_rest(backbone, config, begun, before.pairs + pairs, shards, Ranks())
    return NewPairs(manifest, pairs, report.read - pairs)


def _begun(folder: Path, planned: Manifest) -> Manifest:
    """The plan with the whole shards that an earlier run of it has left."""
    with suppress(DatastoreError):  # there is none, or it is damaged
        previous = Manifest.load(folder, BUILDING)
        old = len(planned.shards)
        if replace(previous, shards=previous.shards[:old]) == planned:
            for shard in previous.shards[old:]:
                if not shard.is_whole(folder):
                    break
                planned = planned.with_shard(shard)
    return planned


def _numbered(corpus: CorpusFile, new: set[bytes], first: int) -> Iterator[tuple[int, Pair]]:
    """The new pairs with their numbers, each once."""
    for number, pair in enumerate(read_pairs(corpus), first):
        if (digest := _digest(pair)) in new:
            new.remove(digest)
            yield number, pair


def _digest(pair: Pair) -> bytes:
    return hashlib.blake2b(json.dumps([pair.src, pair.tgt, pair.document]).encode(), digest_size=16).digest()
