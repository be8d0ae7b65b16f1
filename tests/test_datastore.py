"""What is written is what the model computes, once, whole, and only opened with what it was made with."""

import errno
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy import stats
from tiny_stores import build_store, corpus_pairs, write_corpus, write_store
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone import Backbone, Batch
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, MalformedCorpusError, ReadReport
from lightning_knnmt.datastore import (
    Datastore,
    DatastoreConfig,
    DatastoreError,
    Manifest,
    build_datastore,
    builder,
    encoder,
    lock,
)
from lightning_knnmt.datastore.files import PartialFile
from lightning_knnmt.datastore.manifest import library_versions
from lightning_knnmt.datastore.sealed import write_sealed
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.datastore.verify import verify
from lightning_knnmt.index import IndexConfig, build_index, open_index

PAIRS = corpus_pairs(23)


@pytest.fixture(scope="module")
def folder(tiny_folder_of: Callable[[str], Path]) -> Path:
    return tiny_folder_of("marian")


@pytest.fixture(scope="module")
def backbone(folder: Path) -> Backbone:
    return Backbone(str(folder), device="cpu")


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    return DatastoreConfig(
        tmp_path / "store", write_corpus(tmp_path / "corpus.jsonl", PAIRS), max_tokens=100, shard_entries=60
    )


def by_place(store: Datastore) -> dict[tuple[int, int], tuple[int, np.ndarray]]:
    """(pair's number, position) -> value and key of every entry."""
    keys = np.concatenate(list(store.key_chunks(50)))
    found = {}
    for entry in range(len(store)):
        context = store.context(entry)
        assert context.pair == PAIRS[context.number]
        found[context.number, context.position] = (int(store.values[entry]), keys[entry])
    assert len(found) == len(store)
    return found


def test_every_target_token_is_an_entry_with_the_state_that_hugging_face_predicts_it_from(
    backbone: Backbone, folder: Path, config: DatastoreConfig
) -> None:
    manifest = build_datastore(backbone, config)
    model = AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    with Datastore(config.folder) as store:
        assert len(manifest.shards) > 2
        assert max(shard.entries for shard in manifest.shards) <= 60
        found = by_place(store)
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


def test_shards_hold_what_one_whole_file_holds(backbone: Backbone, tmp_path: Path) -> None:
    with (
        build_store(backbone, tmp_path / "whole", PAIRS) as whole,
        build_store(backbone, tmp_path / "parts", PAIRS, shard_entries=40) as parts,
    ):
        assert len(whole.manifest.shards) == 1
        assert len(parts.manifest.shards) > 5
        one, many = by_place(whole), by_place(parts)
    assert one.keys() == many.keys()
    for place, (value, key) in one.items():
        assert value == many[place][0]
        np.testing.assert_allclose(key, many[place][1], rtol=3e-3, atol=3e-3)


def test_entries_of_a_shard_are_sorted_by_length_the_longest_first(backbone: Backbone, tmp_path: Path) -> None:
    with build_store(backbone, tmp_path / "store", PAIRS) as store:
        numbers = [store.context(entry).number for entry in range(len(store))]
    sides = list(zip(*backbone.tokenize([p.src for p in PAIRS], [p.tgt for p in PAIRS]), strict=True))
    lengths = [max(map(len, sides[number])) for number in numbers]
    batches = token_budget_batches([max(map(len, side)) for side in sides], 128)
    longest = [max(len(side) for row in batch for side in sides[row]) for batch in reversed(batches)]
    assert longest == sorted(longest, reverse=True)
    assert lengths[0] > lengths[-1]


def test_a_corpus_without_pairs_makes_an_empty_datastore(backbone: Backbone, tmp_path: Path) -> None:
    with build_store(backbone, tmp_path / "store", []) as store:
        assert len(store) == 0
        assert store.values.shape == (0,)
        assert list(store.key_chunks()) == []
        assert store.sample_keys(10).shape == (0, backbone.key_size)
        with pytest.raises(IndexError, match="entry is 0, the datastore is empty"):
            store.context(0)


def test_context_of_an_entry_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with write_store(tmp_path / "store", np.eye(5, dtype=np.float16), np.arange(5, dtype=np.int32), [2, 3]) as store:
        assert [store.context(entry).number for entry in range(5)] == list(range(5))
        for entry in (-1, 5):
            with pytest.raises(IndexError, match=f"entry is {entry}, expected 0 to 4"):
                store.context(entry)


def numbered_store(folder: Path, sizes: list[int]) -> Datastore:
    """A store whose keys spell the entries' numbers."""
    numbers = np.arange(sum(sizes))
    keys = np.stack([numbers // 1000, numbers % 1000], 1).astype(np.float16)
    return write_store(folder, keys, (numbers % 17).astype(np.int32), sizes)


def test_sampled_keys_are_a_uniform_draw_without_repetition_over_all_shards(tmp_path: Path) -> None:
    sizes = [700, 50, 1250]
    drawn = np.zeros(sum(sizes), int)
    with numbered_store(tmp_path / "store", sizes) as store:
        for seed in range(60):
            sample = store.sample_keys(150, seed, block=64)
            numbers = (sample @ [1000, 1]).astype(int)
            assert len(set(numbers)) == len(numbers) == 150
            drawn[numbers] += 1
        everything = store.sample_keys(10**6, block=64)
    observed = drawn.reshape(40, 50).sum(1)  # [stretch of 50 entries -> draws], a store is sorted within shards
    assert stats.chisquare(observed).pvalue > 0.001
    assert (everything @ [1000, 1]).astype(int).tolist() == list(range(2000))


def test_samples_of_a_length_sorted_store_have_the_lengths_of_the_whole(tmp_path: Path) -> None:
    sizes = [900, 400, 700]
    rng = np.random.default_rng(3)
    lengths = np.concatenate([np.sort(rng.geometric(0.05, size))[::-1] for size in sizes])
    keys = np.stack([lengths, rng.random(2000)], 1).astype(np.float16)
    with write_store(tmp_path / "store", keys, np.arange(2000, dtype=np.int32), sizes) as store:
        means = [store.sample_keys(100, seed)[:, 0].mean() for seed in range(20)]
    error = lengths.std() / np.sqrt(100 * 20)
    assert abs(np.mean(means) - lengths.mean()) < 4 * error
    assert abs(lengths[:100].mean() - lengths.mean()) > 20 * error  # what k-means on a prefix would see


def test_key_chunks_are_all_keys_in_the_order_of_the_entries(tmp_path: Path) -> None:
    with numbered_store(tmp_path / "store", [70, 5, 125]) as store:
        chunks = list(store.key_chunks(30))
        assert max(map(len, chunks)) == 30
        numbers = np.concatenate(chunks).astype(int) @ [1000, 1]
        assert numbers.tolist() == list(range(200))
        assert store.values.tolist() == [number % 17 for number in range(200)]


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


def test_the_builder_holds_no_more_than_one_shard_of_pairs_and_one_tokenizer_block(
    backbone: Backbone, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def counted(_: CorpusFile, report: ReadReport | None = None) -> Iterator[Pair]:
        for number in range(300):
            yield CountedPair(f"Datei {number}", f"file {number}")

    monkeypatch.setattr(builder, "read_pairs", counted)
    monkeypatch.setattr(encoder, "TOKENIZED_AT_ONCE", 7)
    manifest = build_datastore(backbone, config)
    assert manifest.pairs == 300
    assert len(manifest.shards) > 5
    assert CountedPair.most <= max(shard.pairs for shard in manifest.shards) + 7 + 1


def test_padding_of_the_builders_batches_is_under_5_percent() -> None:
    rng = np.random.default_rng(1)
    lengths = np.clip(np.round(rng.lognormal(3.0, 0.7, 40_000)), 2, 250).astype(int)  # mean 25, as sentences are
    batches = token_budget_batches(lengths.tolist(), 8192)
    padded = sum(len(batch) * max(lengths[item] for item in batch) for batch in batches)
    assert 1 - lengths.sum() / padded < 0.05
    assert max(len(batch) * max(lengths[item] for item in batch) for batch in batches) <= 8192


def test_a_datastore_of_the_same_model_and_corpus_is_kept(
    backbone: Backbone, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_datastore(backbone, config)
    monkeypatch.setattr(backbone, "keys", None)  # encoding again would fail
    assert build_datastore(backbone, config) == first
    assert build_datastore(backbone, replace(config, overwrite=True)) == first


def test_a_datastore_of_another_corpus_is_refused_and_replaced_when_asked(
    backbone: Backbone, config: DatastoreConfig, tmp_path: Path
) -> None:
    before = build_datastore(backbone, config)
    other = replace(config, corpus=write_corpus(tmp_path / "other.jsonl", PAIRS[:5]))
    with pytest.raises(DatastoreError, match=r"already holds another datastore: corpus corpus.jsonl .* other.jsonl"):
        build_datastore(backbone, other)
    assert Manifest.load(config.folder) == before
    after = build_datastore(backbone, replace(other, overwrite=True))
    assert after.pairs == 5
    assert sorted(path.name for path in config.folder.glob("*")) == [
        "manifest.json", *(shard.file for shard in after.shards), "writer.lock"
    ]  # fmt: skip
    with Datastore(config.folder) as store:
        assert {store.context(entry).pair for entry in range(len(store))} == set(PAIRS[:5])


def test_a_datastore_of_another_key_type_is_not_kept(folder: Path, backbone: Backbone, config: DatastoreConfig) -> None:
    build_datastore(backbone, config)
    other = Backbone(str(folder), key_type="ffn_input", device="cpu")
    with pytest.raises(DatastoreError, match=r"key_type decoder_output against ffn_input .there against wanted."):
        build_datastore(other, config)


def test_a_corpus_read_with_other_options_is_another_corpus(backbone: Backbone, config: DatastoreConfig) -> None:
    build_datastore(backbone, config)
    turned = replace(config, corpus=replace(config.corpus, src_lang="en", tgt_lang="de"))
    with pytest.raises(DatastoreError, match=r"corpus.src_lang de against en; corpus.tgt_lang en against de"):
        build_datastore(backbone, turned)


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_damaged_shards_are_made_again_and_those_before_them_are_kept(
    backbone: Backbone, config: DatastoreConfig, harm: str
) -> None:
    before = build_datastore(backbone, config)
    contents = {path.name: path.read_bytes() for path in config.folder.iterdir()}
    first = config.folder / before.shards[0].file
    stamp = first.stat()
    harm_file(config.folder / before.shards[1].file, harm)
    assert build_datastore(backbone, config) == before
    assert {path.name: path.read_bytes() for path in config.folder.iterdir()} == contents
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == (stamp.st_ino, stamp.st_mtime_ns)


def test_a_malformed_corpus_leaves_the_datastore_that_it_was_to_replace(
    backbone: Backbone, config: DatastoreConfig, tmp_path: Path
) -> None:
    before = build_datastore(backbone, config)
    bad = write_corpus(tmp_path / "bad.jsonl", [*PAIRS[:3], Pair("Quelle ohne Ziel", " ")])
    with pytest.raises(MalformedCorpusError, match="empty target side"):
        build_datastore(backbone, replace(config, corpus=bad, overwrite=True))
    with Datastore(config.folder) as store:
        assert len(store) == before.entries


def test_an_interrupted_build_leaves_nothing_that_opens_and_can_be_repeated(
    backbone: Backbone, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
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
        assert len({place[0] for place in by_place(store)}) == len(PAIRS)


def interrupt(monkeypatch: pytest.MonkeyPatch, backbone: Backbone, config: DatastoreConfig, shards: int) -> Manifest:
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
    backbone: Backbone, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
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
        manifest = build_datastore(backbone, config)
    assert tokenized == [pair.src for pair in PAIRS[begun.pairs :]]
    assert manifest.shards[:2] == begun.shards
    whole = build_datastore(backbone, replace(config, folder=config.folder.with_name("whole")))
    assert whole == manifest
    for shard in whole.shards:
        assert (config.folder / shard.file).read_bytes() == (config.folder.with_name("whole") / shard.file).read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_tokens": 99}, "max_tokens 100 against 99"),
        ({"shard_entries": 61}, "shard_entries 60 against 61"),
        ({"libraries": {"torch": "0.1"}}, "torch .* against 0.1"),
    ],
)
def test_a_build_that_was_stopped_is_not_continued_with_another_plan(
    backbone: Backbone,
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
        assert len({place[0] for place in by_place(store)}) == len(PAIRS)


def test_a_folder_that_cannot_be_written_to_is_an_error_unless_nothing_is_to_be_written(
    backbone: Backbone, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = build_datastore(backbone, config)
    config.folder.with_name("file").touch()

    def refuse(*_: object) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(lock.os, "open", refuse)
    assert build_datastore(backbone, config) == manifest
    with pytest.raises(DatastoreError, match=r"other cannot be written to .Read-only file system.; make room or allow"):
        build_datastore(backbone, replace(config, folder=config.folder.with_name("other")))
    with pytest.raises(DatastoreError, match=r"file cannot be written to .File exists."):
        build_datastore(backbone, replace(config, folder=config.folder.with_name("file")))


def test_reading_changes_nothing(backbone: Backbone, config: DatastoreConfig) -> None:
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
            by_place(store)
            open_index(store).search(store.sample_keys(3), 2)
        assert verify(config.folder) == []
        assert build_datastore(backbone, config).entries == len(store)
    finally:
        config.folder.chmod(0o755)
    assert [
        (path.name, path.read_bytes(), path.stat().st_mtime_ns) for path in sorted(config.folder.iterdir())
    ] == before
    assert config.folder.stat().st_mtime_ns == folder_time


@pytest.mark.parametrize("factor", [1e7, np.nan])
def test_keys_beyond_fp16_are_refused_and_the_pair_is_named(
    backbone: Backbone, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    keys = backbone.keys
    wanted = backbone.tokenize([PAIRS[11].src])[0][0]

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


def harm_file(path: Path, harm: str) -> None:
    content = path.read_bytes()
    if harm == "missing":
        path.unlink()
    elif harm == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-50] + bytes(50))


@pytest.mark.parametrize(
    ("harm", "message"), [("missing", "shard-00001.h5 is missing"), ("truncated", "shard-00001.h5 is damaged")]
)
def test_a_datastore_with_a_missing_or_truncated_shard_does_not_open(tmp_path: Path, harm: str, message: str) -> None:
    numbered_store(tmp_path / "store", [70, 5, 125]).close()
    harm_file(tmp_path / "store" / "shard-00001.h5", harm)
    with pytest.raises(DatastoreError, match=f"{message}.*build the datastore again"):
        Datastore(tmp_path / "store")


def test_a_shard_of_another_size_or_kind_does_not_open(tmp_path: Path) -> None:
    numbered_store(tmp_path / "store", [70, 5]).close()
    numbered_store(tmp_path / "other", [71, 5]).close()
    path = tmp_path / "store" / "shard-00000.h5"
    (tmp_path / "other" / "shard-00000.h5").replace(path)
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 holds keys of shape \(71, 2\), expected \(70, 2\)"):
        Datastore(tmp_path / "store")
    with h5py.File(path, "a") as file:
        del file["lengths"], file["values"]
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 lacks lengths, values; build the datastore again"):
        Datastore(tmp_path / "store")


def sealed(**changes: object) -> Callable[[Path], None]:
    """Change fields as somebody who can compute checksums would."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        del content["sha256"]
        write_sealed(path, content | changes)

    return change


def as_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: path.write_text(change(path.read_text())) and None


SHARD = {"file": "shard-00000.h5", "entries": 7, "pairs": 7, "sha256": "0" * 64}
PROVENANCE = {
    "model": "m", "model_sha256": "0", "tokenizer_sha256": "0", "key_type": "decoder_output", "key_size": 2,
    "src_lang": None, "tgt_lang": None,
}  # fmt: skip


def shard(**changes: object) -> Callable[[Path], None]:
    return sealed(shards=[SHARD | changes])


def provenance(**changes: object) -> Callable[[Path], None]:
    return sealed(provenance=PROVENANCE | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_text(lambda text: text[: len(text) // 2]), "is damaged .*build the datastore again"),
        (as_text(lambda text: "[1, 2]"), "is damaged .it holds list, expected an object"),
        (as_text(lambda text: text.replace('"corpus": "none"', '"corpus": "nine"')), "its checksum does not fit"),
        (as_text(lambda text: text + " "), "its checksum does not fit its content"),
        (as_text(lambda text: "[" * 100_000 + "]" * 100_000), "is damaged .it is nested too deeply"),
        (
            as_text(lambda text: text.replace('"reading": {}', '"reading": ' + '{"a":' * 900 + "1" + "}" * 900)),
            "damaged",
        ),
        (as_text(lambda text: text.replace('"format"', '"fmt"')), "has format None, expected 2; build it again"),
        (sealed(format=99), "has format 99, expected 2; build it again"),
        (sealed(keysize=7), "is damaged .*keysize"),
        (sealed(shards=5), "is damaged"),
        (sealed(shards=[5]), "is damaged"),
        (sealed(shards=[SHARD, SHARD]), "it names shard-00000.h5 more than once"),
        (sealed(provenance=None), "is damaged"),
        (sealed(reading=[]), "reading is '\\[\\]', expected dict"),
        (shard(file="../outside.h5"), r"names the shard '../outside.h5', expected a file name NAME.h5 without folders"),
        (shard(file="/etc/passwd"), "names the shard '/etc/passwd'"),
        (shard(file=".."), "names the shard '..'"),
        (shard(file=""), "names the shard ''"),
        (shard(file=5), "file is '5', expected str"),
        (shard(entries=-1), "entries of shard-00000.h5 is -1, expected 0 to"),
        (shard(entries=10**18), "entries of shard-00000.h5 is 1000000000000000000, expected 0 to"),
        (shard(entries=10**15), r"shard-00000.h5 holds keys of shape \(7, 2\), expected \(1000000000000000, 2\)"),
        (shard(pairs=10**12), r"holds lengths of shape \(7,\), expected \(1000000000000,\)"),
        (shard(entries=7.0), "entries is '7.0', expected int"),
        (shard(entries=True), "entries is 'True', expected int"),
        (shard(entries="7"), "entries is '7', expected int"),
        (provenance(key_size=0), "key_size is 0, expected 1 to"),
        (provenance(key_size=10**18), "key_size is 1000000000000000000, expected 1 to"),
        (provenance(src_lang=[]), "src_lang is '\\[\\]', expected"),
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    numbered_store(tmp_path / "store", [7]).close()
    change(tmp_path / "store" / "manifest.json")
    with pytest.raises(DatastoreError, match=message):
        Datastore(tmp_path / "store")


def replaced(name: str, **options: Any) -> Callable[[h5py.File], None]:
    """Put another dataset in the place of one."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def linked(link: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["keys"]
        file["keys"] = link

    return change


def virtual(file: h5py.File) -> None:
    del file["keys"]
    layout = h5py.VirtualLayout((7, 2), np.float16)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "keys", (7, 2))
    file.create_virtual_dataset("keys", layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("keys", shape=(7, 2), dtype=np.float16, external="/etc/passwd"), "keys that are not a plain array"),
        (linked(h5py.ExternalLink("/elsewhere.h5", "keys")), "holds keys that are not a plain array of its own"),
        (linked(h5py.SoftLink("/values")), "holds keys that are not a plain array of its own"),
        (virtual, "holds keys that are not a plain array of its own"),
        (replaced("keys", shape=(7, 2), dtype=np.float16, compression="gzip"), "keys that are not a plain array"),
        (replaced("keys", shape=(7, 2), dtype=np.float32), "holds keys of type float32, expected float16"),
        (replaced("keys", shape=(7, 2), dtype=np.float16), "holds only a part of its keys"),
        (replaced("values", shape=(10**12,), dtype=np.int32), r"holds values of shape .*, expected \(7,\)"),
        (replaced("src", data=np.arange(7)), "holds src of type int64, expected text"),
        (replaced("src", shape=(7,), dtype=h5py.ref_dtype), "holds src of type object, expected text"),
        (replaced("numbers", shape=(7,), dtype=h5py.vlen_dtype(np.int64)), "holds numbers of type object"),
    ],
)
def test_a_shard_that_holds_anything_but_plain_arrays_and_texts_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    numbered_store(tmp_path / "store", [7]).close()
    with h5py.File(tmp_path / "store" / "shard-00000.h5", "a") as file:
        change(file)
    with pytest.raises(DatastoreError, match=f"shard-00000.h5 .*{message}.*; build the datastore again"):
        Datastore(tmp_path / "store")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused_and_the_folder_may_be_one(tmp_path: Path) -> None:
    numbered_store(tmp_path / "store", [7]).close()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with Datastore(tmp_path / "link") as store:
        assert len(store) == 7
    path = tmp_path / "store" / "shard-00000.h5"
    path.rename(tmp_path / "outside.h5")
    path.symlink_to(tmp_path / "outside.h5")
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 is a link to .*outside.h5, expected a file in the"):
        Datastore(tmp_path / "store")
    assert [problem.file for problem in verify(tmp_path / "store")] == ["shard-00000.h5"]


def test_writing_does_not_follow_a_link_that_somebody_has_put_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "shard-00000.h5.partial").symlink_to(tmp_path / "precious")
    (tmp_path / "store" / "manifest.json.partial").symlink_to(tmp_path / "precious")
    with ShardWriter(tmp_path / "store" / "shard-00000.h5", 0, 0, 2):
        pass
    write_sealed(tmp_path / "store" / "manifest.json", {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_damaged_manifest_is_replaced_when_asked(backbone: Backbone, config: DatastoreConfig) -> None:
    before = build_datastore(backbone, config)
    (config.folder / "manifest.json").write_text("{")
    with pytest.raises(DatastoreError, match=r"another datastore: .*manifest.json is damaged"):
        build_datastore(backbone, config)
    assert build_datastore(backbone, replace(config, overwrite=True)).entries == before.entries


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_sha256", "f" * 64, "model .* against .*\\(ffffffffffff\\)"),
        ("tokenizer_sha256", "f" * 64, "tokenizer .* against f{16}"),
        ("key_type", "ffn_input", "key_type decoder_output against ffn_input"),
        ("key_size", 7, "key_size 24 against 7"),
        ("src_lang", "de", "src_lang None against de"),
        ("tgt_lang", "en", "tgt_lang None against en"),
    ],
)
def test_a_model_that_did_not_make_the_keys_is_refused(
    backbone: Backbone, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, message: str
) -> None:
    with build_store(backbone, tmp_path / "store", PAIRS[:4]) as store:
        store.check(backbone)
        other = replace(store.manifest.provenance, **{field: value})
        monkeypatch.setattr("lightning_knnmt.datastore.store.Provenance.of", lambda _: other)
        with pytest.raises(DatastoreError, match=rf"does not fit the model .*{message} .datastore against model."):
            store.check(backbone)


def test_other_weights_in_a_folder_of_the_same_name_are_another_model(
    backbone: Backbone, folder: Path, tmp_path: Path
) -> None:
    with build_store(backbone, tmp_path / "store", PAIRS[:4]) as store:
        with torch.no_grad():
            model = AutoModelForSeq2SeqLM.from_pretrained(folder)
            model.lm_head.weight[3, 3] += 0.1
        copy = tmp_path / "marian"
        backbone.tokenizer.save_pretrained(copy)
        model.save_pretrained(copy)
        with pytest.raises(DatastoreError, match=r"does not fit the model .*: model "):
            store.check(Backbone(str(copy), device="cpu"))


def test_a_shard_that_gets_too_little_is_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    keys = np.eye(3, dtype=np.float16)
    with (
        pytest.raises(RuntimeError, match="got 3 entries of 1 pairs, expected 4 of 2"),
        ShardWriter(path, entries=4, pairs=2, key_size=3) as writer,
    ):
        writer.append(keys, np.arange(3, dtype=np.int32), [3], [Pair("a", "b")], [0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["max_tokens", "shard_entries"])
def test_sizes_under_1_are_refused(config: DatastoreConfig, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
        replace(config, **{name: 0})


@pytest.mark.parametrize("room", [0, 700, 5000, 10**6])
def test_a_file_on_a_full_disk_reads_as_if_all_had_been_written_and_keeps_the_error(tmp_path: Path, room: int) -> None:
    class Disk(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    file, twin = PartialFile(tmp_path / "file"), io.BytesIO()
    file._file.close()
    file._file = Disk()  # type: ignore[assignment]
    rng = np.random.default_rng(room)
    for _ in range(300):
        position, size = int(rng.integers(0, 8000)), int(rng.integers(0, 900))
        if rng.random() < 0.6:
            content = rng.bytes(size)
            for either in (file, twin):
                either.seek(position)
                either.write(content)
        else:
            buffer, expected = bytearray(size), bytearray(size)
            assert file.seek(position) == twin.seek(position)
            assert file.readinto(buffer) == twin.readinto(expected)
            assert buffer == expected
        assert file.tell() == twin.tell()
        assert file.seek(0, io.SEEK_END) == twin.seek(0, io.SEEK_END)
    if room < 10**6:
        with pytest.raises(OSError, match="No space left on device"):
            file.finish()
    else:
        file.check()
