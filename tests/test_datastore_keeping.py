"""What is there is kept, replaced or continued as asked."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stores import by_place, corpus_pairs, harm_file, write_corpus

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building import datastore as builder
from lightning_knnmt.building.datastore import DatastoreBuild, DatastoreConfig, build_datastore
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import MalformedCorpusError
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.datastore.manifest import library_versions
from lightning_knnmt.storage.errors import DatastoreError

PAIRS = corpus_pairs(23)


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    return DatastoreConfig(
        tmp_path / "store", write_corpus(tmp_path / "corpus.jsonl", PAIRS), max_tokens=100, shard_pairs=5
    )


def test_a_datastore_of_the_same_model_and_corpus_is_kept(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_datastore(backbone, config).manifest
    monkeypatch.setattr(backbone, "keys", None)  # encoding again would fail
    assert build_datastore(backbone, config) == DatastoreBuild(first, 0, kept=True)
    assert build_datastore(backbone, replace(config, overwrite=True)) == DatastoreBuild(first, 0, kept=True)


def test_a_datastore_of_another_corpus_is_refused_and_replaced_when_asked(
    backbone: KeyedModel, config: DatastoreConfig, tmp_path: Path
) -> None:
    before = build_datastore(backbone, config).manifest
    other = replace(config, corpus=write_corpus(tmp_path / "other.jsonl", PAIRS[:5]))
    with pytest.raises(DatastoreError, match=r"already holds another datastore: corpus corpus.jsonl .* other.jsonl"):
        build_datastore(backbone, other)
    assert Manifest.load(config.folder) == before
    after = build_datastore(backbone, replace(other, overwrite=True)).manifest
    assert after.pairs == 5
    assert sorted(path.name for path in config.folder.glob("*")) == [
        "manifest.json", *(shard.file for shard in after.shards), "writer.lock"
    ]  # fmt: skip
    with Datastore(config.folder) as store:
        assert {store.context(entry).pair for entry in range(len(store))} == set(PAIRS[:5])


def test_a_datastore_of_another_key_type_is_not_kept(backbone: KeyedModel, config: DatastoreConfig) -> None:
    build_datastore(backbone, config)
    other = load_model(backbone.name, key_type="ffn_input", device="cpu")
    with pytest.raises(DatastoreError, match=r"key_type decoder_output against ffn_input .there against wanted."):
        build_datastore(other, config)


def test_a_corpus_read_with_other_options_is_another_corpus(backbone: KeyedModel, config: DatastoreConfig) -> None:
    build_datastore(backbone, config)
    turned = replace(config, corpus=replace(config.corpus, src_lang="en", tgt_lang="de"))
    with pytest.raises(DatastoreError, match=r"corpus.src_lang de against en; corpus.tgt_lang en against de"):
        build_datastore(backbone, turned)


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_damaged_shards_are_made_again_and_those_before_them_are_kept(
    backbone: KeyedModel, config: DatastoreConfig, harm: str
) -> None:
    before = build_datastore(backbone, config).manifest
    contents = {path.name: path.read_bytes() for path in config.folder.iterdir()}
    first = config.folder / before.shards[0].file
    stamp = first.stat()
    harm_file(config.folder / before.shards[1].file, harm)
    encoded = sum(shard.entries for shard in before.shards[1:])
    assert build_datastore(backbone, config) == DatastoreBuild(before, encoded, kept=False)
    assert {path.name: path.read_bytes() for path in config.folder.iterdir()} == contents
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)


def test_a_malformed_corpus_leaves_the_datastore_that_it_was_to_replace(
    backbone: KeyedModel, config: DatastoreConfig, tmp_path: Path
) -> None:
    before = build_datastore(backbone, config).manifest
    bad = write_corpus(tmp_path / "bad.jsonl", [*PAIRS[:3], Pair("Quelle", "mit \0")])
    with pytest.raises(MalformedCorpusError, match="NUL byte in the target side"):
        build_datastore(backbone, replace(config, corpus=bad, overwrite=True))
    with Datastore(config.folder) as store:
        assert len(store) == before.entries


def test_a_damaged_manifest_is_replaced_when_asked(backbone: KeyedModel, config: DatastoreConfig) -> None:
    before = build_datastore(backbone, config).manifest
    (config.folder / "manifest.json").write_text("{")
    with pytest.raises(DatastoreError, match=r"another datastore: .*manifest.json is damaged"):
        build_datastore(backbone, config)
    assert build_datastore(backbone, replace(config, overwrite=True)).manifest.entries == before.entries


def test_an_interrupted_build_leaves_nothing_that_opens_and_can_be_repeated(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0
    keys = backbone.keys

    def interrupted(batch: Batch) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return keys(batch)

    build_datastore(backbone, replace(config, corpus=replace(config.corpus, max_characters=4000)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(backbone, "keys", interrupted)
        build_datastore(backbone, replace(config, overwrite=True))
    assert calls == 4
    assert not list(config.folder.glob("*.partial"))
    with pytest.raises(DatastoreError, match=r"holds an unfinished datastore .manifest.json is missing.; build it"):
        Datastore(config.folder)
    build_datastore(backbone, config)
    with Datastore(config.folder) as store:
        assert len({place[0] for place in by_place(store, PAIRS)}) == len(PAIRS)


def interrupt(monkeypatch: pytest.MonkeyPatch, backbone: KeyedModel, config: DatastoreConfig, shards: int) -> Manifest:
    """Begin a datastore and stop after some shards."""
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        write = builder.write_shard

        def interrupted(*args: Any) -> None:
            if (config.folder / f"shard-{shards - 1:05d}.h5").exists():
                raise KeyboardInterrupt
            write(*args)

        patch.setattr(builder, "write_shard", interrupted)
        build_datastore(backbone, config)
    return Manifest.load(config.folder, "building.json")


def test_a_build_that_was_stopped_tokenizes_and_encodes_only_the_rest(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = interrupt(monkeypatch, backbone, config, shards=2)
    assert len(begun.shards) == 2 and 0 < begun.pairs < len(PAIRS)
    tokenized: list[str] = []
    tokenize = backbone.tokenize

    def counted(sources: Sequence[str], targets: Sequence[str] | None = None) -> tuple[list[list[int]], ...]:
        tokenized.extend(sources)
        return tokenize(sources, targets)

    with monkeypatch.context() as patch:
        patch.setattr(backbone, "tokenize", counted)
        manifest = build_datastore(backbone, config).manifest
    assert tokenized == [pair.src for pair in PAIRS[begun.pairs :]]
    assert manifest.shards[:2] == begun.shards
    whole = build_datastore(backbone, replace(config, folder=config.folder.with_name("whole"))).manifest
    assert whole == manifest
    for shard in whole.shards:
        assert (config.folder / shard.file).read_bytes() == (config.folder.with_name("whole") / shard.file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 99}, "max_tokens 100 against 99"),
        ({"shard_pairs": 6}, "shard_pairs 5 against 6"),
        ({"libraries": {"torch": "0.1"}}, "torch .* against 0.1"),
    ],
)
def test_a_build_that_was_stopped_is_not_continued_with_another_plan(
    backbone: KeyedModel,
    config: DatastoreConfig,
    monkeypatch: pytest.MonkeyPatch,
    change: dict[str, Any],
    message: str,
) -> None:
    interrupt(monkeypatch, backbone, config, shards=2)
    if "libraries" in change:
        libraries = library_versions() | change["libraries"]
        monkeypatch.setattr(builder, "Manifest", partial(Manifest, libraries=libraries))
        monkeypatch.setattr(builder.Manifest, "load", Manifest.load, raising=False)
        other = config
    else:
        other = replace(config, **change)
    with pytest.raises(DatastoreError, match=f"holds 2 shards of another plan: {message} .*overwrite: true"):
        build_datastore(backbone, other)
    assert len(Manifest.load(config.folder, "building.json").shards) == 2
    build_datastore(backbone, replace(other, overwrite=True))
    with Datastore(config.folder) as store:
        assert len({place[0] for place in by_place(store, PAIRS)}) == len(PAIRS)
