"""Vocabulary selection: a part of the vocabulary is predicted, and what it cannot change stays as it is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, GERMAN

from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.firefox.shortlist import SHORTLIST_FILE, Shortlist, read_shortlist
from lightning_knnmt.backbone.int8 import Int8Linear
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.shortlist import learn_shortlist, load_shortlist, open_shortlist, save_shortlist
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.timing import Spans

PAIRS = [Pair(*pair) for pair in zip(GERMAN, ENGLISH, strict=True)]


def everything(size: int) -> Shortlist:
    return Shortlist(size, np.zeros(size + 1, np.int64), np.empty(0, np.int64))


def only(size: int, tokens: list[int]) -> Shortlist:
    return Shortlist(0, np.arange(size + 1, dtype=np.int64) * len(tokens), np.array(tokens * size, np.int64))


def sequences(translator: Translator) -> list[list[int]]:
    return translator.generate(translator.model.batch(GERMAN), Spans()).tolist()


def file_of(table: Shortlist, folder: Path) -> str:
    save_shortlist(table, folder / "table.npz")
    return str(folder / "table.npz")


@pytest.mark.parametrize(
    ("beams", "options"), [(1, {}), (4, {}), (2, {"no_repeat_ngram_size": 2}), (3, {"early_stopping": True})]
)
@pytest.mark.parametrize("family", ["firefox", "marian", "t5"])
def test_a_table_of_all_tokens_changes_nothing(
    family: str, beams: int, options: dict[str, Any], tiny_folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(str(tiny_folder_of(family)), device="cpu")
    table = file_of(everything(model.vocabulary_size), tmp_path)
    memory = build_memory(model, GERMAN, ENGLISH)
    for mixture in (PlainModel(), KnnSettings(k=4, lambda_=0.5, temperature=20.0).open(model, memory)):
        found = [
            sequences(Translator(model, mixture, Decoding(beams, 8, 14, options, shortlist=shortlist)))
            for shortlist in (None, table)
        ]
        assert found[0] == found[1]


@pytest.mark.parametrize("beams", [1, 4])
def test_only_tokens_of_the_table_and_those_of_neighbors_come(
    beams: int, tiny_folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    model = load_model(str(tiny_folder_of("firefox")), device="cpu")
    monkeypatched: Any = model
    monkeypatched.model.config.share_encoder_decoder_embeddings = False  # or source tokens were allowed
    table = file_of(only(model.vocabulary_size, [30, 31, 32, 33, 34, 35, 36, 37]), tmp_path)
    special = {model.tokenizer.eos_token_id, model.pad_id}
    decoding = Decoding(beams, 8, 14, shortlist=table)
    plain = sequences(Translator(model, decoding=decoding))
    assert {token for row in plain for token in row} <= {*range(30, 38), *special}
    memory = build_memory(model, GERMAN, ENGLISH)
    mixed = sequences(Translator(model, KnnSettings(4, 0.99, 20.0).open(model, memory), decoding))
    stored = set(memory.values.tolist())
    assert {token for row in mixed for token in row} <= {*range(30, 38), *special, *stored}
    assert {token for row in mixed for token in row} & (stored - set(range(30, 38)) - special)


@pytest.mark.parametrize("beams", [1, 3])
def test_sentences_that_enter_bring_their_tokens(beams: int, tiny_folder_of: Callable[[str], Path]) -> None:
    model = load_model(str(tiny_folder_of("firefox")), device="cpu")
    translator = Translator(model, decoding=Decoding(beams, 3, 14, shortlist="model"))
    texts = [*GERMAN, *GERMAN]
    found = translator.translate(texts).texts
    allowed = open_shortlist(model, "model")
    ids = [allowed(set(row)).tolist() for row in model.tokenize(texts).src]
    produced = [set(model.tokenizer(text_target=text).input_ids) for text in found]
    everyone = {token for row in ids for token in row}
    assert all(tokens <= everyone for tokens in produced if model.tokenizer.unk_token_id not in tokens)
    assert len(found) == len(texts)


def test_the_models_own_table_is_read_from_its_folder(tiny_folder_of: Callable[[str], Path]) -> None:
    folder = tiny_folder_of("firefox")
    model = load_model(str(folder), device="cpu")
    table = read_shortlist(folder / SHORTLIST_FILE, model.vocabulary_size - 1)
    source = {token for row in model.tokenize(GERMAN).src for token in row}
    found = open_shortlist(model, "model")(source).tolist()
    assert set(table.allowed(source, model.vocabulary_size - 1, True).tolist()) <= set(found)


def test_a_learned_table_knows_what_stands_together(tiny_folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(str(tiny_folder_of("marian")), device="cpu")
    table = learn_shortlist(model, PAIRS * 2, best=3, frequent=2, rounds=2, block=4)
    save_shortlist(table, tmp_path / "table.npz")
    assert load_shortlist(tmp_path / "table.npz").targets.tolist() == table.targets.tolist()
    ids = model.tokenize(GERMAN, ENGLISH)
    together: dict[int, set[int]] = {}
    for src, tgt in zip(ids.src, ids.tgt, strict=True):
        for token in src:
            together.setdefault(token, set()).update(tgt)
    everywhere = {token for tgt in ids.tgt for token in tgt}
    for source in range(model.vocabulary_size):
        likely = set(table.targets[table.offsets[source] : table.offsets[source + 1]].tolist())
        assert bool(likely) == (source in together)
        assert len(likely - together.get(source, set())) <= 2  # the frequent ones
        assert likely <= everywhere
        assert len(likely) <= 5


def test_a_table_in_which_each_word_has_one_translation_finds_it(tiny_folder_of: Callable[[str], Path]) -> None:
    from lightning_knnmt.decoding.shortlist import _translation_table

    generator = np.random.default_rng(4)
    sources = [generator.integers(0, 50, 6).tolist() for _ in range(400)]
    table = _translation_table([(src, [49 - token for token in src[::-1]]) for src in sources], 50, 5)
    assert all(likely[0] == 49 - source for source, likely in table.items())


def test_what_is_no_table_is_refused(tiny_folder_of: Callable[[str], Path], tmp_path: Path) -> None:
    model = load_model(str(tiny_folder_of("marian")), device="cpu")
    with pytest.raises(ValueError, match=r"shortlist is model, but .* brings none"):
        Translator(model, decoding=Decoding(max_new_tokens=14, shortlist="model"))
    with pytest.raises(ValueError, match=r"which is no file, expected `model` or a \.npz file"):
        Translator(model, decoding=Decoding(max_new_tokens=14, shortlist=str(tmp_path / "no.npz")))
    with pytest.raises(ValueError, match="shortlist is model and loop is generate, expected loop own"):
        Decoding(loop="generate", shortlist="model")
    (tmp_path / "damaged.npz").write_bytes(b"PK\3\4 no file")
    with pytest.raises(ValueError, match="damaged or no shortlist"):
        load_shortlist(tmp_path / "damaged.npz")
    np.savez(tmp_path / "other.npz", frequent=np.int64(0), offsets=np.array([0, 3]), targets=np.array([1]))
    with pytest.raises(ValueError, match="do not fit"):
        load_shortlist(tmp_path / "other.npz")
    larger = file_of(only(4, [model.vocabulary_size]), tmp_path)
    with pytest.raises(ValueError, match="learn it with the model's own tokenizer"):
        Translator(model, decoding=Decoding(max_new_tokens=14, shortlist=larger))
    with pytest.raises(ValueError, match="only generate can decode"):
        table = file_of(everything(model.vocabulary_size), tmp_path)
        Translator(model, decoding=Decoding(max_new_tokens=14, options={"do_sample": True}, shortlist=table))


@pytest.mark.parametrize("family", ["marian", "t5", "firefox"])
def test_int8_layers_are_near_the_float_ones(family: str, tiny_folder_of: Callable[[str], Path]) -> None:
    exact = load_model(str(tiny_folder_of(family)), device="cpu")
    rounded = load_model(str(tiny_folder_of(family)), device="cpu", quantization="int8")
    assert any(isinstance(module, Int8Linear) for module in rounded.modules())
    batch = exact.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        keys, near = exact.keys(batch), rounded.keys(batch)
    assert not near.equal(keys)
    assert float((near - keys).norm() / keys.norm()) < 0.1
    assert len(sequences(Translator(rounded, decoding=Decoding(3, 8, 14)))) == len(GERMAN)


def test_an_int8_layer_is_a_linear_layer_up_to_rounding() -> None:
    linear = torch.nn.Linear(64, 32)
    inputs = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    expected = linear(inputs).detach()
    assert float((Int8Linear(linear)(inputs) - expected).norm() / expected.norm()) < 0.03


def test_int8_needs_float32_on_a_cpu() -> None:
    with pytest.raises(ValueError, match="quantization is int8 with dtype bfloat16"):
        BackboneConfig("a", quantization="int8", dtype="bfloat16")
    with pytest.raises(ValueError, match="quantization is 'int4', expected one of none, int8"):
        BackboneConfig("a", quantization="int4")  # type: ignore[arg-type]
