"""What is written is what the model computes, once and whole; reading changes nothing."""

import errno
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stores import by_place, corpus_pairs, write_corpus
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building import datastore as builder
from lightning_knnmt.building import encoder
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, ReadReport
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.storage import lock
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import write_json

PAIRS = corpus_pairs(23)


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    return DatastoreConfig(
        tmp_path / "store", write_corpus(tmp_path / "corpus.jsonl", PAIRS), max_tokens=100, shard_pairs=5
    )


def test_every_target_token_is_an_entry_with_the_state_that_hugging_face_predicts_it_from(
    backbone: KeyedModel, config: DatastoreConfig
) -> None:
    manifest = build_datastore(backbone, config).manifest
    model = AutoModelForSeq2SeqLM.from_pretrained(backbone.name).eval()
    with Datastore(config.folder) as store:
        assert len(manifest.shards) > 2
        assert [shard.pairs for shard in manifest.shards] == [5, 5, 5, 5, 3]
        found = by_place(store, PAIRS)
    expected = set()
    for number, pair in enumerate(PAIRS):
        src = backbone.tokenizer(pair.src, return_tensors="pt").input_ids
        tgt = backbone.tokenizer(text_target=pair.tgt, return_tensors="pt").input_ids
        start = torch.tensor([[model.config.decoder_start_token_id]])
        with torch.no_grad():
            output = model(
                input_ids=src, decoder_input_ids=torch.cat([start, tgt[:, :-1]], 1), output_hidden_states=True
            )
        for position, token in enumerate(tgt[0].tolist()):
            value, key = found[number, position]
            assert value == token
            state = output.decoder_hidden_states[-1][0, position].numpy()
            np.testing.assert_allclose(key.astype(np.float32), state, rtol=2e-3, atol=2e-3)
            expected.add((number, position))
    assert set(found) == expected


class CountedPair(Pair):
    """A pair that knows how many of its kind are in memory."""

    alive = 0
    most = 0

    def __init__(self, src: str, tgt: str) -> None:
        super().__init__(src, tgt)
        CountedPair.alive += 1
        CountedPair.most = max(CountedPair.most, CountedPair.alive)

    def __del__(self) -> None:
        CountedPair.alive -= 1


def test_the_builder_holds_no_more_than_two_shards_of_pairs_and_one_tokenizer_block(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(_: CorpusFile, report: ReadReport | None = None) -> Iterator[Pair]:
        for number in range(300):
            yield CountedPair(f"Datei {number}", f"file {number}")

    monkeypatch.setattr(builder, "read_pairs", counted)
    monkeypatch.setattr(encoder, "TOKENIZED_AT_ONCE", 7)
    manifest = build_datastore(backbone, config).manifest
    assert manifest.pairs == 300
    assert len(manifest.shards) > 5
    assert CountedPair.most <= 2 * max(shard.pairs for shard in manifest.shards) + 7 + 1


def test_a_folder_that_cannot_be_written_to_is_an_error_unless_nothing_is_to_be_written(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_datastore(backbone, config).manifest
    config.folder.with_name("file").touch()

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", refuse)
    assert build_datastore(backbone, config).manifest == manifest
    with pytest.raises(DatastoreError, match=r"other cannot be written to .Read-only file system.; make room or allow"):
        build_datastore(backbone, replace(config, folder=config.folder.with_name("other")))
    with pytest.raises(DatastoreError, match=r"file cannot be written to .File exists."):
        build_datastore(backbone, replace(config, folder=config.folder.with_name("file")))


@pytest.mark.parametrize("kind", ["link", "hard link", "dangling link", "pipe", "folder"])
def test_what_is_called_as_the_lock_and_is_no_plain_file_is_refused_and_left_as_it_is(
    tmp_path: Path, kind: str
) -> None:
    folder, other = tmp_path / "store", tmp_path / "precious"
    folder.mkdir()
    path = folder / "writer.lock"
    if kind != "dangling link":
        other.write_text("content")
    make = {
        "link": lambda: path.symlink_to(other), "dangling link": lambda: path.symlink_to(other),
        "hard link": lambda: path.hardlink_to(other), "pipe": lambda: os.mkfifo(path), "folder": path.mkdir,
    }[kind]  # fmt: skip
    make()
    with (
        pytest.raises(DatastoreError, match=r"is a link or no plain file|cannot be written to"),
        lock.only_writer(folder),
    ):
        pass
    assert other.read_text() == "content" if kind != "dangling link" else not other.exists()


@pytest.mark.parametrize("kind", ["link", "hard link"])
def test_a_link_in_the_place_of_a_file_that_is_being_written_is_not_followed(tmp_path: Path, kind: str) -> None:
    other, partial = tmp_path / "precious", tmp_path / "build.json.partial"
    other.write_text("content")
    partial.symlink_to(other) if kind == "link" else partial.hardlink_to(other)
    write_json(tmp_path / "build.json", {"share": float("nan"), "path": tmp_path, "list": (1, 2)})
    assert other.read_text() == "content"
    found = json.loads((tmp_path / "build.json").read_text())
    assert found == {"share": None, "path": str(tmp_path), "list": [1, 2]}
    assert not partial.exists() and not partial.is_symlink()


def test_the_corpus_is_read_once_unless_it_is_to_replace_another(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    read, tokenized = [], []
    read_pairs, tokenize = builder.read_pairs, backbone.tokenize

    def counted(corpus: CorpusFile, report: ReadReport | None = None) -> Iterator[Pair]:
        for pair in read_pairs(corpus, report):
            read.append(pair)
            yield pair

    monkeypatch.setattr(builder, "read_pairs", counted)
    monkeypatch.setattr(backbone, "tokenize", lambda src, tgt=None: tokenized.extend(src) or tokenize(src, tgt))
    build_datastore(backbone, config)
    assert read == PAIRS and tokenized == [pair.src for pair in PAIRS]
    read.clear()
    other = write_corpus(tmp_path / "other.jsonl", PAIRS[:5])
    build_datastore(backbone, replace(config, corpus=other, overwrite=True))
    assert read == PAIRS[:5] * 2


def test_texts_that_are_cut_are_counted_by_the_build(backbone: KeyedModel, config: DatastoreConfig) -> None:
    assert build_datastore(backbone, config).cut == 0
    long = " ".join(["Datei"] * 500)
    corpus = write_corpus(config.corpus.path, [*PAIRS, Pair(long, "file"), Pair(long, long)])
    built = build_datastore(backbone, replace(config, corpus=corpus, overwrite=True))
    assert (built.cut, built.manifest.pairs) == (3, len(PAIRS) + 2)


def test_a_disk_that_knows_no_locks_is_an_error(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(DatastoreError, match=r"cannot be locked .No locks available.; choose a folder on a disk"):
        build_datastore(backbone, config)
    assert not list(config.folder.glob("*.h5"))


def test_reading_changes_nothing(backbone: KeyedModel, config: DatastoreConfig) -> None:
    build_datastore(backbone, config)
    with Datastore(config.folder) as store:
        build_index(store, IndexConfig("Flat"))
    paths = sorted(config.folder.iterdir())
    before = [(path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in paths]
    folder_time = config.folder.stat().st_mtime_ns
    for path in [*paths, config.folder]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        with Datastore(config.folder) as store:
            store.check(backbone)
            by_place(store, PAIRS)
            open_index(store).search(store.sample_keys(3), 2)
        assert verify(config.folder) == []
        assert build_datastore(backbone, config).manifest.entries == len(store)
    finally:
        config.folder.chmod(0o755)
    assert [
        (path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(config.folder.iterdir())
    ] == before
    assert config.folder.stat().st_mtime_ns == folder_time


@pytest.mark.parametrize("factor", [1e7, np.nan])
def test_keys_beyond_fp16_are_refused_and_the_pair_is_named(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    keys = backbone.keys
    wanted = backbone.tokenize([PAIRS[11].src]).src[0]

    def overflowing(batch: Batch) -> torch.Tensor:
        found = keys(batch).clone()
        for row, ids in enumerate(batch.input_ids.tolist()):
            if ids[: len(wanted)] == wanted:
                found[row, 0, 3] *= factor
        return found

    monkeypatch.setattr(backbone, "keys", overflowing)
    with pytest.raises(DatastoreError, match=r"a key of pair 11 \('11 .*NaN or beyond fp16's range"):
        build_datastore(backbone, config)
    with pytest.raises(DatastoreError, match="holds an unfinished datastore"):
        Datastore(config.folder)


def test_the_thread_that_writes_fails_for_all(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise DatastoreError("no room")

    with monkeypatch.context() as patch, pytest.raises(DatastoreError, match="no room"):
        patch.setattr(encoder.ShardWriter, "append", full)
        build_datastore(backbone, config)
    assert not list(config.folder.glob("shard-*"))
    assert build_datastore(backbone, config).manifest.pairs == len(PAIRS)


def test_one_is_made_ahead_in_order_and_errors_come_where_they_arise() -> None:
    made = []

    def numbers() -> Iterator[int]:
        for number in range(4):
            made.append(number)
            yield number
        raise ValueError("the fifth")

    found = []
    with pytest.raises(ValueError, match="the fifth"):
        for number in encoder.one_ahead(numbers()):
            found.append(number)
            assert len(made) <= number + 2
    assert found == made == [0, 1, 2, 3]


def test_little_of_the_batches_that_a_model_gets_is_padding(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = padded = 0
    keys = backbone.keys

    def counted(batch: Batch) -> torch.Tensor:
        nonlocal real, padded
        real += int(batch.attention_mask.sum() + batch.target_mask.sum())
        padded += batch.attention_mask.numel() + batch.target_mask.numel()
        return keys(batch)

    monkeypatch.setattr(backbone, "keys", counted)
    build_datastore(backbone, replace(config, max_tokens=8192, max_padding=0.07, shard_pairs=1 << 14))
    assert 0 < padded - real <= 0.07 * padded


def test_padding_beyond_all_is_refused(config: DatastoreConfig) -> None:
    with pytest.raises(ValueError, match=r"max_padding is 1.5, expected 0 to 1"):
        replace(config, max_padding=1.5)


@pytest.mark.parametrize("name", ["max_tokens", "shard_pairs"])
def test_sizes_under_1_are_refused(config: DatastoreConfig, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
        replace(config, **{name: 0})
