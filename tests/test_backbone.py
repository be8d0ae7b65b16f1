"""Keys of teacher forcing are keys of decoding, in every family of models; errors say what to do."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import ENGLISH, GERMAN, POSITIONS, TINY_FAMILIES, TinyFamily
from torch import Tensor
from transformers import AutoModelForSeq2SeqLM, BloomConfig

from lightning_knnmt.backbone.batch import IGNORED, Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel, TokenIds

ROOT = Path(__file__).parents[1]
FolderOf = Callable[[str], Path]
KEY_TYPES = ["decoder_output", "ffn_input"]


def decode_with_keys(backbone: KeyedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Greedy search with cache: the sequences (B, 1 + T) and the keys of every step (B, T, D)."""
    steps = []
    with backbone.tap() as tap:

        def remember(_: Tensor, scores: Tensor) -> Tensor:
            steps.append(tap.keys[:, -1].clone())
            return scores

        sequences = backbone.generate(batch, do_sample=False, num_beams=1, logits_processor=[remember])
    return sequences, torch.stack(steps, dim=1)


def labels_of(backbone: KeyedModel, sequences: Tensor) -> Tensor:
    """Generated tokens (B, T) as labels of different lengths: row i loses i tokens and what follows its end."""
    labels = sequences[:, 1:].clone()
    for row, tokens in enumerate(labels):
        ends = (tokens == backbone.model.config.eos_token_id).nonzero().flatten().tolist()
        length = min([len(tokens) - row, *(end + 1 for end in ends)])
        tokens[length:] = IGNORED
    return labels


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_teacher_forced_keys_are_the_keys_of_decoding(tiny_folder: Path, tiny_family: TinyFamily, key_type):
    backbone = load_model(str(tiny_folder), key_type=key_type, device="cpu", **tiny_family.languages)
    batch = backbone.batch(GERMAN)
    assert not batch.attention_mask.bool().all(), "sources differ in length"
    sequences, decoded = decode_with_keys(backbone, batch)
    batch.labels = labels_of(backbone, sequences)
    with torch.inference_mode():
        keys = backbone.keys(batch)
    mask = batch.target_mask
    assert not mask.all() and mask.any(1).all(), "targets differ in length"
    assert keys.shape == (len(GERMAN), batch.labels.shape[1], backbone.key_size)
    torch.testing.assert_close(keys[mask], decoded[:, : keys.shape[1]][mask], rtol=1e-4, atol=2e-5)
    assert decoded.diff(dim=1).abs().amax(-1).median() > 1e-2, "a shift by one step would show"


def test_tiny_models_translate_differently_at_every_step_and_sentence(tiny_backbone: KeyedModel):
    sequences = tiny_backbone.generate(tiny_backbone.batch(GERMAN))[:, 2:-1]
    assert min(len(row.unique()) for row in sequences) > 1
    assert len(sequences.unique(dim=0)) > 2


def test_a_sentence_has_the_same_keys_alone_and_in_a_padded_batch(tiny_backbone: KeyedModel):
    batch = tiny_backbone.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        together = tiny_backbone.keys(batch)
        for row, (source, target) in enumerate(zip(GERMAN, ENGLISH, strict=True)):
            alone = tiny_backbone.keys(tiny_backbone.batch([source], [target]))[0]
            torch.testing.assert_close(together[row, : len(alone)], alone, rtol=1e-4, atol=2e-5)


def test_project_of_decoder_outputs_is_the_models_own_logits(tiny_backbone: KeyedModel):
    batch = tiny_backbone.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        keys, logits = tiny_backbone.keys_and_logits(batch)
        assert logits.shape == (*batch.labels.shape, tiny_backbone.vocabulary_size)
        torch.testing.assert_close(tiny_backbone.project(keys), logits)
        torch.testing.assert_close(tiny_backbone.keys(batch), keys)


def test_logits_are_those_of_hugging_face_with_labels(tiny_backbone: KeyedModel):
    batch = tiny_backbone.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        ours = tiny_backbone.keys_and_logits(batch)[1]
        labels = batch.labels.clone()  # FSMT overwrites them
        if tiny_backbone.model.config.model_type == "fsmt":
            shifted = tiny_backbone.model.prepare_decoder_input_ids_from_labels(labels)
            options = {"decoder_input_ids": shifted}
        else:
            options = {"labels": labels}
        theirs = tiny_backbone.model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, use_cache=False, **options
        ).logits
    torch.testing.assert_close(ours[batch.target_mask], theirs[batch.target_mask])


@pytest.mark.parametrize("beams", [1, 3])
def test_generate_is_plain_generate_with_the_language_set_by_hand(
    tiny_backbone: KeyedModel, tiny_folder: Path, tiny_family: TinyFamily, beams: int
):
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_folder).eval()
    batch = tiny_backbone.batch(GERMAN)
    by_hand = {
        option: tiny_backbone.tokenizer.convert_tokens_to_ids(token) for option, token in tiny_family.by_hand.items()
    }
    expected = model.generate(
        input_ids=batch.input_ids, attention_mask=batch.attention_mask, num_beams=beams, **by_hand
    )
    assert torch.equal(tiny_backbone.generate(batch, num_beams=beams), expected)
    for option, token in by_hand.items():
        position = {"decoder_start_token_id": 0, "forced_bos_token_id": 1}[option]
        assert (expected[:, position] == token).all(), "the options by hand are what they should be"


@pytest.mark.parametrize("name", [name for name, family in TINY_FAMILIES.items() if family.languages])
def test_languages_mark_sources_and_targets(tiny_folder_of: FolderOf, name: str):
    family, folder = TINY_FAMILIES[name], str(tiny_folder_of(name))
    backbone = load_model(folder, src_lang=family.src_lang, tgt_lang=family.tgt_lang, device="cpu")
    swapped = load_model(folder, src_lang=family.tgt_lang, tgt_lang=family.src_lang, device="cpu")
    ids = backbone.tokenize(GERMAN, GERMAN)
    sources, targets = ids.src, ids.tgt
    assert swapped.tokenize(GERMAN, GERMAN) == TokenIds(targets, sources, 0)
    (option, token), at = *family.by_hand.items(), -1 if name == "mbart25" else 0
    language_id = backbone.tokenizer.convert_tokens_to_ids(token)
    assert all(target[at] == language_id != source[at] for source, target in zip(sources, targets, strict=True))
    assert (backbone.start_id if option == "decoder_start_token_id" else backbone.forced_id) == language_id
    assert (swapped.generate(swapped.batch(GERMAN)) != backbone.generate(backbone.batch(GERMAN))).any()


def test_fsmt_targets_are_read_with_the_target_vocabulary(tiny_folder_of: FolderOf, tmp_path: Path):
    backbone = load_model(str(tiny_folder_of("fsmt")), device="cpu")
    for _ in range(2):  # the second round starts from what the first left behind
        ids = backbone.tokenize(["Datei"], ["Choose a file"])
        (source,), (target,) = ids.src, ids.tgt
        vocabulary = json.loads((tiny_folder_of("fsmt") / "vocab-tgt.json").read_text())
        assert target[:2] == [vocabulary["C"], vocabulary["h"]]
        assert source[0] == json.loads((tiny_folder_of("fsmt") / "vocab-src.json").read_text())["D"]
        assert backbone.tokenizer.decode(target, skip_special_tokens=True) == "Choose a file"
    backbone.save(tmp_path / "saved")
    assert load_model(str(tmp_path / "saved"), device="cpu").tokenizer_fingerprint == backbone.tokenizer_fingerprint


def test_a_saved_backbone_is_the_same_backbone(tiny_backbone: KeyedModel, tiny_family: TinyFamily, tmp_path: Path):
    tiny_backbone.save(tmp_path)
    again = load_model(str(tmp_path), device="cpu", **tiny_family.languages)
    batch = tiny_backbone.batch(GERMAN, ENGLISH)
    assert torch.equal(again.batch(GERMAN, ENGLISH).labels, batch.labels)
    with torch.inference_mode():
        torch.testing.assert_close(again.keys(batch), tiny_backbone.keys(batch))
    assert again.tokenizer_fingerprint == tiny_backbone.tokenizer_fingerprint


def test_target_mask_marks_the_tokens_of_each_target(tiny_backbone: KeyedModel):
    batch = tiny_backbone.batch(GERMAN, ENGLISH)
    lengths = [len(row) for row in tiny_backbone.tokenize(GERMAN, ENGLISH).tgt]
    assert batch.target_mask.sum(1).tolist() == lengths and len(set(lengths)) > 1
    assert len(batch) == len(GERMAN)


def hooks(backbone: KeyedModel) -> int:
    return sum(len(module._forward_pre_hooks) for module in backbone.modules())


@pytest.mark.parametrize("key_type", KEY_TYPES)
def test_hooks_go_even_after_exceptions(marian_folder: Path, key_type):
    backbone = load_model(str(marian_folder), key_type=key_type, device="cpu")
    batch = backbone.batch(GERMAN, ENGLISH)
    before = hooks(backbone)
    backbone.keys(batch)
    backbone.keys_and_logits(batch)
    assert hooks(backbone) == before
    with pytest.raises(RuntimeError, match="own"), backbone.tap() as tap:
        assert hooks(backbone) == before + 1
        assert tap.keys is None
        raise RuntimeError("own")
    assert hooks(backbone) == before
    batch.input_ids = batch.input_ids + 10**6
    with pytest.raises(IndexError):
        backbone.keys(batch)
    assert hooks(backbone) == before


@pytest.mark.parametrize("key_type", KEY_TYPES)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_keys_are_close_to_full_precision(
    tiny_folder: Path, tiny_family: TinyFamily, key_type, dtype: str
):
    full = load_model(str(tiny_folder), key_type=key_type, device="cpu", **tiny_family.languages)
    half = load_model(str(tiny_folder), key_type=key_type, device="cpu", dtype=dtype, **tiny_family.languages)
    batch = full.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        expected, keys = full.keys(batch)[batch.target_mask], half.keys(batch)[batch.target_mask]
    assert keys.dtype == getattr(torch, dtype)
    assert (keys.float() - expected).norm() < 0.1 * expected.norm()
    assert half.generate(batch, max_new_tokens=3).shape == (len(GERMAN), 4)


def test_keys_carry_gradients_for_training(tiny_folder: Path, tiny_family: TinyFamily):
    backbone = load_model(str(tiny_folder), device="cpu", **tiny_family.languages)
    batch = backbone.batch(GERMAN, ENGLISH)
    backbone.project(backbone.keys(batch))[batch.target_mask].logsumexp(-1).sum().backward()
    assert backbone.output_projection.weight.grad.norm() > 0
    assert any(
        weight.grad is not None and weight.grad.norm() > 0 for weight in backbone.model.get_encoder().parameters()
    )


def test_long_texts_are_cut_and_counted(tiny_folder: Path, tiny_family: TinyFamily):
    backbone = load_model(str(tiny_folder), device="cpu", **tiny_family.languages)
    long = " ".join(GERMAN[1:3] * 9)
    ids = backbone.tokenize(["Open", long], ["Open", long])
    sources, targets = ids.src, ids.tgt
    counts = [ids.cut, backbone.tokenize([long]).cut, backbone.tokenize(["Open"]).cut]
    counts += [backbone.batch([long, "Open"]).cut, backbone.batch([long], [long]).to("cpu").cut]
    if backbone.position_limit is None:  # T5
        assert min(len(sources[1]), len(targets[1])) > POSITIONS
        assert counts == [0, 0, 0, 0, 0]
    else:
        assert len(sources[1]) == len(targets[1]) == POSITIONS
        assert [ids[1][-1] for ids in (sources, targets)] == [ids[0][-1] for ids in (sources, targets)]
        assert counts == [2, 1, 0, 1, 2]
        with torch.inference_mode():
            assert backbone.keys(backbone.batch([long], [long])).shape == (1, POSITIONS, backbone.key_size)


def test_fingerprints_are_equal_for_a_copy(tiny_backbone: KeyedModel, tiny_folder: Path, tiny_family, tmp_path: Path):
    copy = load_model(str(shutil.copytree(tiny_folder, tmp_path / "copy")), device="cpu", **tiny_family.languages)
    assert copy.model_fingerprint == tiny_backbone.model_fingerprint
    assert copy.tokenizer_fingerprint == tiny_backbone.tokenizer_fingerprint


def test_a_hub_name_loads_what_its_folder_holds_and_an_unknown_one_is_named(marian_folder: Path, tmp_path: Path):
    cached, revision = tmp_path / "hub" / "models--somebody--marian", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(marian_folder, cached / "snapshots" / revision)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(revision)
    script = (
        "import sys; from lightning_knnmt import load_model\n"
        "backbone = load_model(sys.argv[1], device='cpu')\n"
        "print(backbone.name, backbone.model_fingerprint, backbone.tokenizer_fingerprint)\n"
        "try: load_model('somebody/else')\n"
        "except OSError as error: print(error)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    for variable in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE"):
        environment.pop(variable, None)
    done = subprocess.run(
        [sys.executable, "-c", script, "somebody/marian"],
        check=True, timeout=120, cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    folder = load_model(str(marian_folder), device="cpu")
    loaded, *message = done.stdout.splitlines()
    assert loaded.split() == ["somebody/marian", folder.model_fingerprint, folder.tokenizer_fingerprint]
    expected = "model 'somebody/else' is no folder with a config.json here, and the hub gave none of that name: "
    assert "\n".join(message).startswith(expected)


def test_one_changed_weight_changes_the_model_fingerprint(marian_folder: Path, tmp_path: Path):
    folder = shutil.copytree(marian_folder, tmp_path / "copy")
    weights = load_file(folder / "model.safetensors")
    weights["model.decoder.layers.0.fc1.weight"][0, 0] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before, after = (load_model(str(path), device="cpu") for path in (marian_folder, folder))
    assert after.model_fingerprint != before.model_fingerprint
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint


def test_another_configuration_of_the_same_weights_changes_the_model_fingerprint(marian_folder: Path, tmp_path: Path):
    changed = Path(shutil.copytree(marian_folder, tmp_path / "changed"))
    config = json.loads((changed / "config.json").read_text())
    config["transformers_version"] = "4.0.0"
    (changed / "config.json").write_text(json.dumps(config))
    before = load_model(str(marian_folder), device="cpu").model_fingerprint
    assert load_model(str(changed), device="cpu").model_fingerprint == before
    config["scale_embedding"] = not config["scale_embedding"]
    (changed / "config.json").write_text(json.dumps(config))
    assert load_model(str(changed), device="cpu").model_fingerprint != before


def test_a_prefix_stands_before_every_source_and_no_target(marian_folder: Path):
    plain = load_model(str(marian_folder), device="cpu")
    prefixed = load_model(str(marian_folder), device="cpu", src_prefix="Der Drucker: ")
    expected = plain.tokenize([f"Der Drucker: {text}" for text in GERMAN], ENGLISH)
    assert prefixed.tokenize(GERMAN, ENGLISH) == expected


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("marian_scratch", "tokenizer.json"),
        ("fsmt", "vocab-tgt.json"),
        ("fsmt", "vocab-src.json"),
        ("t5", "tokenizer.json"),
    ],
)
def test_one_changed_token_changes_the_tokenizer_fingerprint(tiny_folder_of: FolderOf, tmp_path: Path, name, file):
    folder = shutil.copytree(tiny_folder_of(name), tmp_path / "copy")
    content = json.loads((folder / file).read_text())
    if file == "tokenizer.json":
        content["model"]["vocab"][-10][0] += "x"
    else:
        token = sorted(content)[-10]
        content[token + "x"] = content.pop(token)
    (folder / file).write_text(json.dumps(content))
    before, after = (load_model(str(path), device="cpu") for path in (tiny_folder_of(name), folder))
    assert after.tokenizer_fingerprint != before.tokenizer_fingerprint
    assert after.model_fingerprint == before.model_fingerprint


def test_missing_weight_files_cannot_be_fingerprinted(marian_folder: Path, tmp_path: Path):
    backbone = load_model(str(shutil.copytree(marian_folder, tmp_path / "copy")), device="cpu")
    (tmp_path / "copy" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither \*\.safetensors nor pytorch_model\*\.bin"):
        _ = backbone.model_fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_type": "ffn"}, "key_type is 'ffn', expected one of decoder_output, ffn_input"),
        ({"dtype": "int8"}, "dtype is 'int8', expected one of float32, bfloat16, float16"),
        ({"src_lang": "de"}, "src_lang is 'de', but the tokenizer of .* has no languages; leave it out"),
        ({"tgt_lang": "en"}, "tgt_lang is 'en', but the tokenizer of .* has no languages; leave it out"),
    ],
)
def test_wrong_options_are_named(marian_folder: Path, options, message: str):
    with pytest.raises(ValueError, match=message):
        load_model(str(marian_folder), device="cpu", **options)


@pytest.mark.parametrize("name", ["marian", "t5", "fsmt"])
def test_bilingual_models_take_no_language(tiny_folder_of: FolderOf, name: str):
    with pytest.raises(ValueError, match=r"src_lang is 'de', but the tokenizer of .* has no languages; leave"):
        load_model(str(tiny_folder_of(name)), src_lang="de", tgt_lang="en")


@pytest.mark.parametrize(
    ("name", "unknown", "known"),
    [("m2m100", "den", "de"), ("nllb", "de_DE", "deu_Latn"), ("mbart25", "de", "de_DE"), ("mbart50", "de", "de_DE")],
)
def test_languages_are_checked_with_suggestions(tiny_folder_of: FolderOf, name: str, unknown: str, known: str):
    folder = str(tiny_folder_of(name))
    for option, other in (("src_lang", "tgt_lang"), ("tgt_lang", "src_lang")):
        message = f"{option} is {unknown!r}, which the tokenizer of .* does not know, expected one of .*{known}"
        with pytest.raises(ValueError, match=message):
            load_model(folder, **{option: unknown, other: known})
        with pytest.raises(ValueError, match=f"{option} is missing: .* is multilingual, expected one of .*{known}"):
            load_model(folder, **{other: known})
    with pytest.raises(ValueError, match="src_lang is '</s>', which the tokenizer"):
        load_model(folder, src_lang="</s>", tgt_lang=known)


def test_legacy_nllb_layout_is_refused(tiny_folder_of: FolderOf, tmp_path: Path):
    folder = shutil.copytree(tiny_folder_of("nllb"), tmp_path / "copy")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "legacy_behaviour": True}))
    with pytest.raises(ValueError, match="legacy_behaviour on, which misplaces languages; turn it off"):
        load_model(str(folder), src_lang="deu_Latn", tgt_lang="eng_Latn")


def test_unsupported_models_are_refused(tmp_path: Path):
    BloomConfig().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is of type 'bloom', expected one of bart, firefox, fsmt, gpt2, llama, "):
        load_model(str(tmp_path))


def test_models_without_a_decoder_start_are_refused(tiny_folder_of: FolderOf, tmp_path: Path):
    folder = shutil.copytree(tiny_folder_of("t5"), tmp_path / "copy")
    for name in ("config.json", "generation_config.json"):
        content = json.loads((folder / name).read_text())
        content.pop("decoder_start_token_id", None)
        (folder / name).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has no decoder_start_token_id in its config; set it there"):
        load_model(str(folder), device="cpu")


def test_keys_need_labels(tiny_backbone: KeyedModel):
    batch = tiny_backbone.batch(GERMAN)
    for ask in (tiny_backbone.keys, tiny_backbone.keys_and_logits, lambda batch: batch.target_mask):
        with pytest.raises(ValueError, match="the batch has no labels, expected a batch made with target texts"):
            ask(batch)
