"""What is read is what was written, all of it or a fair sample, and only with the model that it was made with."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from tiny_stores import build_store, by_place, corpus_pairs, numbered_store, write_store
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.datastore.manifest import read_manifest
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import MANIFEST
from lightning_knnmt.storage.sealed import read_sealed, write_sealed

PAIRS = corpus_pairs(23)


def test_shards_hold_what_one_whole_file_holds(backbone: KeyedModel, tmp_path: Path) -> None:
    with (
        build_store(backbone, tmp_path / "whole", PAIRS) as whole,
        build_store(backbone, tmp_path / "parts", PAIRS, shard_pairs=3) as parts,
    ):
        assert len(whole.manifest.shards) == 1
        assert len(parts.manifest.shards) > 5
        one, many = by_place(whole, PAIRS), by_place(parts, PAIRS)
    assert one.keys() == many.keys()
    for place, (value, key) in one.items():
        assert value == many[place][0]
        np.testing.assert_allclose(key, many[place][1], rtol=3e-3, atol=3e-3)


def test_a_store_of_an_earlier_version_is_read_and_keeps_its_fingerprint(backbone: KeyedModel, tmp_path: Path) -> None:
    build_store(backbone, tmp_path / "store", PAIRS, shard_pairs=3).close()
    path = tmp_path / "store" / MANIFEST
    content = read_sealed(path)
    earlier = {}
    for name, value in content.items():
        if name == "shards":
            earlier["shard_entries"] = 40
        if name != "shard_pairs":
            earlier[name] = value
    write_sealed(path, earlier)
    manifest, fingerprint = read_manifest(tmp_path / "store")
    assert (manifest.shard_entries, manifest.shard_pairs, manifest.pairs_of_a_shard) == (40, None, 3)
    manifest.save(tmp_path / "store")
    assert read_manifest(tmp_path / "store") == (manifest, fingerprint)


def test_entries_of_a_shard_are_sorted_by_length_the_longest_first(backbone: KeyedModel, tmp_path: Path) -> None:
    with build_store(backbone, tmp_path / "store", PAIRS) as store:
        numbers = [store.context(entry).number for entry in range(len(store))]
    ids = backbone.tokenize([p.src for p in PAIRS], [p.tgt for p in PAIRS])
    sides = list(zip(ids.src, ids.tgt, strict=True))
    lengths = [max(map(len, sides[number])) for number in numbers]
    batches = token_budget_batches([max(map(len, side)) for side in sides], 128)
    longest = [max(len(side) for row in batch for side in sides[row]) for batch in reversed(batches)]
    assert longest == sorted(longest, reverse=True)
    assert lengths[0] > lengths[-1]


def test_a_corpus_without_pairs_makes_an_empty_datastore(backbone: KeyedModel, tmp_path: Path) -> None:
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
    backbone: KeyedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, value: object, message: str
) -> None:
    with build_store(backbone, tmp_path / "store", PAIRS[:4]) as store:
        store.check(backbone)
        other = replace(store.manifest.provenance, **{field: value})
        monkeypatch.setattr("lightning_knnmt.datastore.store.Provenance.of", lambda _: other)
        with pytest.raises(DatastoreError, match=rf"does not fit the model .*{message} .datastore against model."):
            store.check(backbone)


def test_other_weights_in_a_folder_of_the_same_name_are_another_model(backbone: KeyedModel, tmp_path: Path) -> None:
    with build_store(backbone, tmp_path / "store", PAIRS[:4]) as store:
        with torch.no_grad():
            model = AutoModelForSeq2SeqLM.from_pretrained(backbone.name)
            model.lm_head.weight[3, 3] += 0.1
        copy = tmp_path / "marian"
        backbone.tokenizer.save_pretrained(copy)
        model.save_pretrained(copy)
        with pytest.raises(DatastoreError, match=r"does not fit the model .*: model "):
            store.check(load_model(str(copy), device="cpu"))
