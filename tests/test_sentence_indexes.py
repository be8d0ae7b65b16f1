"""Sentence indexes on disk: kept up when the datastore changes, refused when they do not fit."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from script_runs import expect_error
from tiny_stores import build_store, corpus_pairs, harm_file, write_corpus
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import build_index
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.compact import compact
from lightning_knnmt.building.config import DatastoreConfig, SentencesConfig
from lightning_knnmt.building.index import build_index as build
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.building.sentences import build_sentences
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.memory import open_sentences
from lightning_knnmt.sentences.encoders import StatesEncoder, TransformersEncoder
from lightning_knnmt.sentences.words import words
from lightning_knnmt.storage.errors import DatastoreError

PAIRS = corpus_pairs(30)
MORE = [Pair(f"Neu {pair.src}", pair.tgt, "new") for pair in PAIRS[:5]]
LIKENESSES = ["bm25", "tf_idf", "states", "encoder"]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny sentence encoder."""
    folder = tmp_path_factory.mktemp("bert") / "tiny"
    known = sorted({word for pair in PAIRS for word in words(pair.src)})
    vocabulary = {word: number for number, word in enumerate(["[PAD]", "[UNK]", "neu", *known])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()  # type: ignore[assignment]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    torch.manual_seed(3)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=24, initializer_range=1.0,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    return folder


@pytest.fixture
def store_of(tmp_path: Path, backbone: KeyedModel, bert: Path) -> Callable[[str], Path]:
    def make(by: str) -> Path:
        folder = tmp_path / by
        with build_store(backbone, folder, PAIRS, 15) as store:
            build(store, IndexConfig("Flat"))
            build_sentences(store, config_of(by, bert), backbone)
        return folder

    return make


def config_of(by: str, bert: Path, overwrite: bool = False) -> SentencesConfig:
    return SentencesConfig(by, encoder=str(bert) if by == "encoder" else None, overwrite=overwrite)  # type: ignore[arg-type]


def found(folder: Path, model: KeyedModel, texts: list[str], count: int = 1) -> list[list[str]]:
    """Sources of the sentences that an index finds for each text."""
    with Datastore(folder) as store:
        sources = [text for shard in store.shards for text in shard.file["src"].asstr()[:]]
        numbers = open_sentences(store, "sentences", model).search(texts, count)
    return [[sources[number] for number in of_text] for of_text in numbers]


@pytest.mark.parametrize("by", LIKENESSES)
def test_a_stored_sentence_finds_itself_after_every_change(
    by: str, store_of: Callable[[str], Path], backbone: KeyedModel, tmp_path: Path
) -> None:
    folder = store_of(by)

    def seen(text: str) -> object:  # the tiny model knows no digits
        return backbone.tokenize([text]).src if by == "states" else text

    texts = [pair.src for pair in PAIRS + MORE]
    nearest = found(folder, backbone, texts[:30])
    assert [seen(own[0]) for own in nearest] == list(map(seen, texts[:30]))
    append_pairs(backbone, DatastoreConfig(folder, write_corpus(tmp_path / "more.jsonl", MORE)))
    assert [seen(own[0]) for own in found(folder, backbone, texts)] == list(map(seen, texts))
    remove_documents(folder, ["page-1"])
    left = [pair.src for pair in PAIRS + MORE if pair.document != "page-1"]
    for check in range(2):
        for text, own in zip(texts, found(folder, backbone, texts, 100), strict=True):
            assert set(own) <= set(left) and (text not in left or seen(own[0]) == seen(text))
            assert by not in ("states", "encoder") or sorted(own) == sorted(left)
        if check == 0:
            compact(folder)
    assert verify(folder) == []
    assert [path.name for path in sorted(folder.glob("*.sentences.*"))] == [
        "sentences.2.sentences.json", "sentences.2.sentences.safetensors",
    ]  # fmt: skip


@pytest.mark.parametrize("by", LIKENESSES)
def test_what_is_kept_up_is_what_would_be_made_anew(
    by: str, store_of: Callable[[str], Path], backbone: KeyedModel, bert: Path, tmp_path: Path
) -> None:
    folder = store_of(by)
    append_pairs(backbone, DatastoreConfig(folder, write_corpus(tmp_path / "more.jsonl", MORE)))
    remove_documents(folder, ["page-2"])
    compact(folder)
    queries = [pair.src for pair in PAIRS[:7]] + ["Neu Datei"]
    before = found(folder, backbone, queries, 4)
    with Datastore(folder) as store:
        build_sentences(store, config_of(by, bert, overwrite=True), backbone)
    assert found(folder, backbone, queries, 4) == before


@pytest.mark.parametrize("encoder", ["states", "encoder"])
def test_vectors_are_means_of_states_whatever_the_batch(encoder: str, backbone: KeyedModel, bert: Path) -> None:
    made = StatesEncoder(backbone) if encoder == "states" else TransformersEncoder(str(bert))
    texts = [pair.src for pair in PAIRS[:9]]
    vectors = made.encode(texts)
    np.testing.assert_allclose(vectors.norm(dim=1), 1, rtol=1e-5)
    for text, vector in zip(texts, vectors, strict=True):
        if encoder == "states":
            states = backbone.encoder_states(backbone.batch([text]))[0]
        else:
            tokens = PreTrainedTokenizerFast.from_pretrained(bert)([text], return_tensors="pt")
            states = BertModel.from_pretrained(bert, add_pooling_layer=False)(**tokens)[0][0]
        mean = states.mean(0)
        torch.testing.assert_close(vector, (mean / mean.norm()).detach(), rtol=1e-3, atol=1e-5)
    assert made.encode([]).shape[0] == 0


def test_an_encoder_that_is_gone_leaves_its_index_behind(
    store_of: Callable[[str], Path], backbone: KeyedModel, bert: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = store_of("encoder")
    hidden = bert.rename(bert.with_name("hidden"))
    try:
        with caplog.at_level(logging.WARNING):
            append_pairs(backbone, DatastoreConfig(folder, write_corpus(tmp_path / "more.jsonl", MORE)))
        assert "the sentence index sentences is left behind" in caplog.text
        with pytest.raises(DatastoreError, match=r"no sentence index called 'sentences' .*build_index.py sentences"):
            found(folder, backbone, ["Datei"])
        assert verify(folder) == []
    finally:
        hidden.rename(bert)


def test_an_encoder_that_is_another_by_now_is_refused(
    store_of: Callable[[str], Path], backbone: KeyedModel, bert: Path
) -> None:
    folder = store_of("encoder")
    weights = bert / "model.safetensors"
    content = weights.read_bytes()
    torch.manual_seed(4)
    try:
        BertModel(BertConfig.from_pretrained(bert), add_pooling_layer=False).save_pretrained(bert)
        with pytest.raises(DatastoreError, match="is another than the one that"):
            found(folder, backbone, ["Datei"])
    finally:
        weights.write_bytes(content)


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_damage_is_seen(harm: str, suffix: str, store_of: Callable[[str], Path], backbone: KeyedModel) -> None:
    folder = store_of("bm25")
    harm_file(folder / f"sentences.sentences.{suffix}", harm)
    with pytest.raises(DatastoreError, match=r"build_index.py sentences|damaged"):
        found(folder, backbone, ["Datei"])
    assert [problem.file for problem in verify(folder)] == [f"sentences.sentences.{suffix}"]


def test_a_stale_index_is_refused(store_of: Callable[[str], Path], backbone: KeyedModel, tmp_path: Path) -> None:
    folder, other = store_of("bm25"), tmp_path / "other"
    with build_store(backbone, other, PAIRS[:20]) as store:
        build_sentences(store, SentencesConfig())
    for path in other.glob("sentences.*"):
        path.replace(folder / path.name)
    with pytest.raises(DatastoreError, match=r"belongs to the datastore .*build_index.py sentences"):
        found(folder, backbone, ["Datei"])
    assert "belongs to another datastore" in str(verify(folder)[0])


def test_an_index_is_kept_or_replaced_as_asked_for(store_of: Callable[[str], Path], backbone: KeyedModel) -> None:
    folder = store_of("bm25")
    path = folder / "sentences.sentences.safetensors"
    before = path.stat().st_mtime_ns
    with Datastore(folder) as store:
        build_sentences(store, SentencesConfig())
        assert path.stat().st_mtime_ns == before
        with pytest.raises(DatastoreError, match="already holds another sentence index"):
            build_sentences(store, SentencesConfig("tf_idf"))
        assert build_sentences(store, SentencesConfig("tf_idf", overwrite=True)).by == "tf_idf"
        with pytest.raises(ValueError, match="by is 'states', expected the model"):
            build_sentences(store, SentencesConfig("states", name="s"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--by", "encoder"), "encoder is None and by is 'encoder'"),
        (("--encoder", "x"), "encoder is 'x' and by is 'bm25'"),
        (("--name", "a.b"), "name is 'a.b'"),
        (("--by", "states"), "expected the model that the datastore was built with"),
        (("--by", "encoder", "--encoder", "no/such/folder"), "no/such/folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    options: tuple[str, ...], message: str, store_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = store_of("bm25")
    capsys.readouterr()
    args = build_index.spell_out(["sentences", str(folder), *options])
    expect_error(capsys, build_index.COMMANDS, *args, expected=message)  # type: ignore[arg-type]
