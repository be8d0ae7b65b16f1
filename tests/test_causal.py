"""Language models as keyed models, against Hugging Face's own logits and `generate` on the whole text."""

import importlib.util
import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_causal import OTHER_PAGE, PAGE, POSITIONS, TINY_CAUSAL
from transformers import AutoModelForCausalLM

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.causal import CausalModel
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.memory import build_memory
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.windows import Windows
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import open_memory

PROMPTS = ["Choose File, then", "To print one page only, enter its number: 12", "Save", ""]
WINDOWS = [window.pair for page in (PAGE, OTHER_PAGE) for window in Windows(100, 60).cut(page)]
DOCUMENTS = [(PAGE, "printing"), (OTHER_PAGE, "passwords")]
SRC, TGT = [pair.src for pair in WINDOWS], [pair.tgt for pair in WINDOWS]


@pytest.fixture(scope="module", params=list(TINY_CAUSAL))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("causal") / request.param
    TINY_CAUSAL[request.param](path)
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> CausalModel:
    loaded = load_model(str(folder), device="cpu")
    assert isinstance(loaded, CausalModel)
    return loaded


@pytest.fixture(params=["decoder_output", "ffn_input"])
def keyed(request: pytest.FixtureRequest, folder: Path) -> CausalModel:
    loaded = load_model(str(folder), device="cpu", key_type=request.param)
    assert isinstance(loaded, CausalModel)
    return loaded


def texts(pages: list[str]) -> tuple[list[str], list[str]]:
    return [""] * len(pages), pages


@torch.inference_mode()
def test_logits_of_targets_are_those_of_hugging_face_on_the_whole_sequence(model: CausalModel):
    ids = model.tokenize(SRC, TGT)
    logits = model(model.batch(SRC, TGT))
    assert logits.shape == (len(TGT), max(map(len, ids.tgt)), model.vocabulary_size)
    for row, (src, tgt) in enumerate(zip(ids.src, ids.tgt, strict=True)):
        own = model.model(torch.tensor([src + tgt])).logits[0, len(src) - 1 : -1]
        torch.testing.assert_close(logits[row, : len(tgt)], own, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_project_of_decoder_outputs_is_the_models_own_logits(model: CausalModel):
    keys, logits = model.keys_and_logits(model.batch(SRC, TGT))
    torch.testing.assert_close(model.project(keys), logits)
    assert keys.shape[-1] == model.key_size


@torch.inference_mode()
def test_keys_are_the_input_of_the_parts_that_their_type_names(keyed: CausalModel):
    ids = keyed.tokenize(SRC, TGT)
    heard: list[torch.Tensor] = []
    part: Any = (
        keyed.family.output_projection if keyed.config.key_type == "decoder_output" else keyed.family.feed_forward
    )
    handle = part(keyed.model).register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    for src, tgt in zip(ids.src, ids.tgt, strict=True):
        keyed.model(torch.tensor([src + tgt]))
    handle.remove()
    keys = keyed.keys(keyed.batch(SRC, TGT))
    for row, (src, tgt, whole) in enumerate(zip(ids.src, ids.tgt, heard, strict=True)):
        torch.testing.assert_close(keys[row, : len(tgt)], whole[0, len(src) - 1 : -1], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_keys_are_the_same_with_logits_and_without(keyed: CausalModel):
    batch = keyed.batch(SRC, TGT)
    keys, _ = keyed.keys_and_logits(batch)
    torch.testing.assert_close(keyed.keys(batch)[batch.target_mask], keys[batch.target_mask])


@torch.inference_mode()
def test_keys_of_windows_with_their_whole_context_are_those_of_the_document(keyed: CausalModel):
    first, *windows = Windows(40, 10_000).cut(OTHER_PAGE)
    assert len(windows) > 1
    batch = keyed.batch([window.context for window in windows], [window.text for window in windows])
    whole = keyed.batch([first.text], [OTHER_PAGE[len(first.text) :]])
    assert torch.equal(batch.target_labels[batch.target_mask], whole.target_labels[0])
    torch.testing.assert_close(keyed.keys(batch)[batch.target_mask], keyed.keys(whole)[0], rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_a_key_is_the_state_that_decoding_has(keyed: CausalModel):
    """What is stored of a text is what a prompt of its beginning asks with, in a batch that is padded on the left."""
    heard: list[torch.Tensor] = []

    def mix(queries: torch.Tensor, logits: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        heard.append(queries)
        return logits

    batch = keyed.batch(PROMPTS)
    with keyed.mixing(mix):
        labels = keyed.generate(batch, max_new_tokens=6, min_new_tokens=6, num_beams=1)[:, 1:]
    forced = collate(keyed.tokenize(PROMPTS).src, labels.tolist(), keyed.pad_id)
    torch.testing.assert_close(torch.stack(heard, dim=1), keyed.keys(forced), rtol=1e-4, atol=1e-4)


def test_every_token_of_a_document_is_a_target_once(model: CausalModel):
    windows = list(Windows(60, 30).cut(PAGE))
    ids = model.tokenize([window.context for window in windows], [window.text for window in windows])
    assert list(chain(*ids.tgt)) == model.tokenizer(PAGE, add_special_tokens=False).input_ids
    assert ids.cut == 0


def test_contexts_begin_as_the_tokenizer_begins_texts(model: CausalModel):
    first, *_ = model.tokenizer("Save").input_ids
    src = model.tokenize(["", "Save"], ["Save", " it"]).src
    if first == model.tokenizer.bos_token_id:
        assert src == [[first], model.tokenizer("Save").input_ids]
    else:
        assert src == [[model.tokenizer.eos_token_id], model.tokenizer("Save").input_ids]
    assert model.tokenize(["", "Save"]).src == src


def test_what_is_too_long_loses_the_beginning_of_its_context(model: CausalModel):
    long = PAGE * 3
    ids = model.tokenize([long, long, "a", ""], [" end", long, "b", long])
    assert ids.cut == 3
    assert [len(src) + len(tgt) for src, tgt in zip(ids.src, ids.tgt, strict=True)][:2] == [POSITIONS, POSITIONS]
    assert ids.tgt[0] == model.tokenize([""], [" end"]).tgt[0]
    assert ids.src[0][-5:] == model.tokenize([PAGE]).src[0][-5:]
    assert all(ids.src)
    with torch.inference_mode():
        assert model(model.batch([long, ""], [" end", long])).isfinite().all()


def test_generation_with_left_padding_is_generation_one_by_one(model: CausalModel):
    batch = model.batch(PROMPTS)
    together = model.generate(batch, max_new_tokens=8, num_beams=1)
    assert together.shape[0] == len(PROMPTS)
    for row, prompt in zip(together.tolist(), PROMPTS, strict=True):
        alone = model.generate(model.batch([prompt]), max_new_tokens=8, num_beams=1)[0].tolist()
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) <= {model.pad_id}


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_hugging_faces_own_continuation(model: CausalModel, folder: Path, beams: int):
    plain = AutoModelForCausalLM.from_pretrained(folder)
    for prompt in PROMPTS[:3]:
        ids = model.tokenizer(prompt, return_tensors="pt").input_ids
        options = {"max_new_tokens": 8, "num_beams": beams}
        own = plain.generate(ids, attention_mask=torch.ones_like(ids), pad_token_id=model.pad_id, **options)
        found = model.generate(model.batch([prompt]), **options)
        assert found[0, 1:].tolist() == own[0, ids.shape[1] :].tolist()


def test_a_prompt_that_leaves_no_room_loses_its_beginning(model: CausalModel):
    found = model.generate(
        model.batch([PAGE * 2, "Save"]), max_new_tokens=POSITIONS - 8, min_new_tokens=20, num_beams=1
    )
    assert found.shape[1] <= 1 + POSITIONS - 8
    last = model.tokenizer.decode(model.tokenize([PAGE * 2]).src[0][-8:])
    again = model.generate(model.batch([last]), max_new_tokens=20, num_beams=1)
    if len(model.tokenize([last]).src[0]) == 8:  # a tokenizer that begins texts with a token has one more
        assert found[0, 1:21].tolist() == again[0, 1:].tolist()


def write_windows(path: Path, pairs: list[Pair]) -> CorpusFile:
    records = ({"context": pair.src, "text": pair.tgt, "document": pair.document} for pair in pairs)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return CorpusFile(path)


def test_a_datastore_of_windows_holds_every_token_with_its_key_and_context(keyed: CausalModel, tmp_path: Path):
    corpus = write_windows(tmp_path / "windows.jsonl", WINDOWS)
    built = build_datastore(keyed, DatastoreConfig(tmp_path / "store", corpus, max_tokens=256))
    ids = keyed.tokenize(SRC, TGT)
    assert built.manifest.entries == sum(map(len, ids.tgt))
    with Datastore(tmp_path / "store") as store:
        seen = set()
        with torch.inference_mode():
            keys = keyed.keys(keyed.batch(SRC, TGT))
        stored = next(store.key_chunks())
        for entry in range(len(store)):
            context = store.context(entry)
            row = WINDOWS.index(context.pair)
            assert store.values[entry] == ids.tgt[row][context.position]
            expected = keys[row, context.position].to(torch.float16)
            torch.testing.assert_close(torch.from_numpy(stored[entry]), expected, rtol=5e-3, atol=5e-3)
            seen.add((row, context.position))
        assert len(seen) == len(store)


def test_mixtures_continue_prompts_as_they_were_stored_and_λ_0_is_the_plain_model(keyed: CausalModel, tmp_path: Path):
    corpus = write_windows(tmp_path / "windows.jsonl", WINDOWS)
    build_datastore(keyed, DatastoreConfig(tmp_path / "store", corpus, max_tokens=256))
    with Datastore(tmp_path / "store") as store:
        build_index(store, IndexConfig(factory="Flat"))
    beginning = TGT[2][: TGT[2].index(" shown")]
    prompt = SRC[2] + beginning
    decoding = Decoding(beams=1, max_new_tokens=8)
    with open_memory(tmp_path / "store") as memory:
        mixture = KnnSettings(k=1, lambda_=0.95, temperature=1.0).open(keyed, memory)
        translated = Translator(keyed, mixture, decoding).translate([prompt, "Save"])
        rest = keyed.tokenizer(TGT[2][len(beginning) :], add_special_tokens=False).input_ids[:8]
        assert translated.texts[0] == keyed.tokenizer.decode(rest)
        plain = Translator(keyed, decoding=decoding).translate([prompt, "Save"])
        nothing = KnnSettings(k=4, lambda_=0.0).open(keyed, memory)
        assert Translator(keyed, nothing, decoding).translate([prompt, "Save"]).texts == plain.texts
        explanation = explain(mixture, prompt, decoding)
        assert explanation.text == translated.texts[0]
        nearest = [token.neighbors[0] for token in explanation.tokens[: len(rest)]]
        assert [neighbor.token for neighbor in nearest] == keyed.tokenizer.convert_ids_to_tokens(rest)
        assert all(neighbor.context.pair == WINDOWS[2] for neighbor in nearest)


def test_memories_in_ram_take_contexts_and_what_continues_them(model: CausalModel):
    memory = build_memory(model, SRC, TGT)
    assert len(memory) == sum(map(len, model.tokenize(SRC, TGT).tgt))
    assert memory.context(0).pair == WINDOWS[0]


def test_a_saved_model_is_the_same_model(keyed: CausalModel, tmp_path: Path):
    keyed.save(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), device="cpu", key_type=keyed.config.key_type)
    batch = keyed.batch(SRC, TGT)
    with torch.inference_mode():
        torch.testing.assert_close(again(batch), keyed(batch))
    assert again.tokenize(SRC, TGT) == keyed.tokenize(SRC, TGT)


@pytest.mark.parametrize("adapter_rank", [None, 2])
def test_only_the_way_from_the_last_block_to_the_logits_is_trained(
    folder: Path, tmp_path: Path, adapter_rank: int | None
):
    model = load_model(str(folder), device="cpu")
    assert isinstance(model, CausalModel)
    batch = model.batch(SRC, TGT)
    with torch.inference_mode():
        before = model(batch)
    model.eval()
    model.freeze_below_output(adapter_rank)
    with torch.inference_mode():
        torch.testing.assert_close(model(batch), before)
    model.train()
    logits = model(batch)
    torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.target_labels).backward()
    trained = {name for name, weight in model.model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in model.model.named_parameters() if weight.requires_grad}
    assert not [name for name in trained if "attn" in name or "embed" in name or "wte" in name or ".0." in name]
    assert [name for name in trained if "lm_head" in name]
    torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5).step()
    model.eval()
    with torch.inference_mode():
        after = model(batch)
    assert (after - before).abs().max() > 1e-3
    model.save(tmp_path / "trained")
    with torch.inference_mode():
        again = load_model(str(tmp_path / "trained"), device="cpu")(batch)
    torch.testing.assert_close(again, after, rtol=1e-4, atol=1e-4)


def test_one_changed_weight_changes_the_fingerprint(model: CausalModel, folder: Path, tmp_path: Path):
    changed = AutoModelForCausalLM.from_pretrained(folder)
    changed.base_model.get_input_embeddings().weight.data[5, 0] += 0.01
    changed.save_pretrained(tmp_path / "changed")
    model.tokenizer.save_pretrained(tmp_path / "changed")
    assert load_model(str(tmp_path / "changed"), device="cpu").model_fingerprint != model.model_fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"src_lang": "de"}, "src_lang is 'de', but .* is a language model; leave it out"),
        ({"tgt_lang": "en"}, "tgt_lang is 'en', but .* is a language model; leave it out"),
        ({"sentences": "en-pt"}, "sentences is 'en-pt', expected one of auto, none"),
    ],
)
def test_options_of_translation_models_are_refused(folder: Path, options: dict[str, str], message: str):
    with pytest.raises(ValueError, match=message):
        load_model(str(folder), device="cpu", **options)


def test_language_models_of_other_structure_are_named(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bloom"}))
    with pytest.raises(ValueError, match=r"is of type 'bloom', expected one of .*gpt2, llama"):
        load_model(str(tmp_path))


def test_a_missing_gguf_file_is_named(tmp_path: Path):
    with pytest.raises(
        FileNotFoundError, match=r"model is '.*none\.gguf', which is no file here, expected a \.gguf file"
    ):
        load_model(str(tmp_path / "none.gguf"))


def test_without_its_package_a_gguf_file_says_how_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    real: Callable[..., Any] = importlib.util.find_spec
    monkeypatch.setattr("lightning_knnmt.backbone.gguf.find_spec", lambda name: None if name == "gguf" else real(name))
    with pytest.raises(ImportError, match=r"reading \.gguf files needs `pip install gguf`"):
        load_model(str(tmp_path / "model.gguf"))


def test_documents_are_appended_and_removed(folder: Path, tmp_path: Path):
    model = load_model(str(folder), device="cpu")
    printing, passwords = (list(Windows(100, 60)([Pair(page, "", name)])) for page, name in DOCUMENTS)
    first, second = (
        write_windows(tmp_path / f"{number}.jsonl", [window.pair for window in windows])
        for number, windows in enumerate((printing, passwords))
    )
    store = tmp_path / "store"
    built = build_datastore(model, DatastoreConfig(store, first, max_tokens=256)).manifest.entries
    with Datastore(store) as opened:
        build_index(opened, IndexConfig(factory="Flat"))
    assert append_pairs(model, DatastoreConfig(store, second, max_tokens=256)).pairs == len(passwords)
    assert append_pairs(model, DatastoreConfig(store, second, max_tokens=256)).pairs == 0
    batch = model.batch([passwords[1].context], [passwords[1].text])
    with torch.inference_mode():
        queries = model.keys(batch)[0]
    with open_memory(store) as memory:
        found = memory.search(queries, k=1)
        assert {memory.context(int(entry)).pair.document for entry in found.ids.flatten()} == {"passwords"}
    remove_documents(store, ["passwords"])
    with open_memory(store) as memory:
        found = memory.search(queries, k=1)
        assert {memory.context(int(entry)).pair.document for entry in found.ids.flatten()} == {"printing"}
        assert int(found.ids.max()) < built
