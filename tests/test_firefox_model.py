"""Firefox Translations models against an implementation in numpy, and everything that can silently go wrong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import torch
from tiny_firefox import DECODER, ENCODER, HEADS, D, Weights, ship
from tiny_models import ENGLISH, GERMAN, POSITIONS
from torch import Tensor
from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer, DynamicCache, GenerationConfig

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.firefox import FirefoxCache, FirefoxConfig, FirefoxForConditionalGeneration
from lightning_knnmt.backbone.firefox.importing import write_folder
from lightning_knnmt.backbone.firefox.layers import sinusoids
from lightning_knnmt.backbone.firefox.model_card import Provenance
from lightning_knnmt.backbone.firefox.shipped_files import ShippedFiles
from lightning_knnmt.backbone.keyed_model import KeyedModel

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module", params=["firefox", "firefox_two_vocabularies"])
def folder(request: pytest.FixtureRequest, tiny_folder_of) -> Path:
    return tiny_folder_of(request.param)


@pytest.fixture(scope="module")
def backbone(folder: Path) -> KeyedModel:
    return load_model(str(folder), device="cpu")


@pytest.fixture(scope="module")
def shared(tiny_folder_of) -> KeyedModel:
    return load_model(str(tiny_folder_of("firefox")), device="cpu")


# --- The whole forward pass in numpy, from Marian's weights -----------------------------------------------------------


def norm(states: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    centred = states - states.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-9)
    return centred / deviation * weights[f"{name}_ln_scale"] + weights[f"{name}_ln_bias"]


def attend(states: np.ndarray, memory: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    def project(inputs: np.ndarray, letter: str) -> np.ndarray:
        return inputs @ weights[f"{name}_W{letter}"] + weights[f"{name}_b{letter}"]

    queries, keys, values = project(states, "q"), project(memory, "k"), project(memory, "v")
    size, heads = D // HEADS, []
    for head in range(HEADS):
        part = slice(head * size, (head + 1) * size)
        scores = np.exp(queries[:, part] @ keys[:, part].T / math.sqrt(size))
        heads.append(scores / scores.sum(-1, keepdims=True) @ values[:, part])
    return project(np.concatenate(heads, axis=1), "o")


def feed_forward(states: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    hidden = np.maximum(states @ weights[f"{name}_ffn_W1"] + weights[f"{name}_ffn_b1"], 0)
    output = hidden @ weights[f"{name}_ffn_W2"] + weights[f"{name}_ffn_b2"]
    return norm(states + output, weights, f"{name}_ffn_ffn")


def positions(length: int) -> np.ndarray:
    table = np.zeros((length, D))
    for position in range(length):
        for i in range(D // 2):
            angle = position * math.exp(-i * math.log(10000) / (D / 2 - 1))
            table[position, i], table[position, D // 2 + i] = math.sin(angle), math.cos(angle)
    return table


def reference_logits(weights: Weights, source: list[int], target: list[int]) -> np.ndarray:
    """Logits (T + 1, V) of one sentence pair before each target token and after the last, from Marian's weights."""
    weights = {name: values.astype(np.float64) for name, values in weights.items()}
    side = {name: weights.get(f"{name}_Wemb", weights.get("Wemb")) for name in ("encoder", "decoder")}
    states = side["encoder"][source] * math.sqrt(D) + positions(len(source))
    for layer in range(1, ENCODER + 1):
        name = f"encoder_l{layer}"
        attended = attend(states, states, weights, f"{name}_self")
        states = feed_forward(norm(states + attended, weights, f"{name}_self_Wo"), weights, name)
    memory = states
    embedded = np.concatenate([np.zeros((1, D)), side["decoder"][target] * math.sqrt(D)])
    states = embedded + positions(len(embedded))
    for layer in range(1, DECODER + 1):
        name, cell, outputs = f"decoder_l{layer}", np.zeros(D), []
        for state in states:
            forget = 1 / (1 + np.exp(-(state @ weights[f"{name}_rnn_Wf"] + weights[f"{name}_rnn_bf"][0])))
            cell = forget * cell + (1 - forget) * (state @ weights[f"{name}_rnn_W"])
            outputs.append(np.maximum(cell, 0))
        states = norm(states + np.array(outputs), weights, f"{name}_rnn_ffn")
        states = norm(states + attend(states, memory, weights, f"{name}_context"), weights, f"{name}_context_Wo")
        states = feed_forward(states, weights, name)
    return states @ side["decoder"].T + weights["decoder_ff_logit_out_b"]


@pytest.mark.parametrize("target_texts", [None, ENGLISH])
@pytest.mark.parametrize("int8", [True, False])
def test_logits_are_those_of_numpy(tmp_path: Path, target_texts: list[str] | None, int8: bool):
    weights = ship(tmp_path / "raw", GERMAN + ENGLISH if target_texts is None else GERMAN, target_texts, int8)
    (tmp_path / "out").mkdir()
    write_folder(ShippedFiles.of(tmp_path / "raw"), Provenance("a test"), tmp_path / "out")
    backbone = load_model(str(tmp_path / "out"), device="cpu")
    batch = backbone.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        logits = backbone.keys_and_logits(batch)[1]
    ids = backbone.tokenize(GERMAN, ENGLISH)
    for row, (source, target) in enumerate(zip(ids.src, ids.tgt, strict=True)):
        expected = reference_logits(weights, source, target[:-1])
        np.testing.assert_allclose(logits[row, : len(target), : expected.shape[1]], expected, rtol=1e-3, atol=1e-4)
        assert (logits[row, :, expected.shape[1] :] == -50).all()


@pytest.mark.parametrize("size", [4, 10, 256])
def test_positions_are_marians_and_not_hugging_faces(size: int):
    half = size // 2
    angles = np.arange(300)[:, None] * np.exp(-np.arange(half) * math.log(10000) / (half - 1))
    expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
    np.testing.assert_allclose(sinusoids(300, size).numpy(), expected, atol=1e-6)
    others = np.arange(300)[:, None] * np.exp(-np.arange(half) * math.log(10000) / half)
    assert np.abs(expected[:, :half] - np.sin(others)).max() > 0.01


# --- Decoding ---------------------------------------------------------------------------------------------------------


def test_step_by_step_with_a_cache_is_the_whole_at_once(backbone: KeyedModel):
    batch = backbone.batch(GERMAN, ENGLISH)
    ids = backbone.model.prepare_decoder_input_ids_from_labels(batch.labels)
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    with torch.inference_mode():
        whole = backbone.model(**inputs, decoder_input_ids=ids, use_cache=False)
        assert whole.past_key_values is None
        cache, steps = None, []
        for chunk in (ids[:, :1], ids[:, 1:2], ids[:, 2:5], ids[:, 5:]):
            output = backbone.model(**inputs, decoder_input_ids=chunk, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            steps.append(output.logits)
    assert isinstance(cache, FirefoxCache) and cache.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(torch.cat(steps, dim=1), whole.logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 2, 5])
def test_cells_follow_their_beams(backbone: KeyedModel, beams: int):
    batch = backbone.batch(GERMAN)
    with_cache = backbone.generate(batch, num_beams=beams, num_return_sequences=beams)
    without = backbone.generate(batch, num_beams=beams, num_return_sequences=beams, use_cache=False)
    assert torch.equal(with_cache, without)


def test_cells_that_stay_behind_would_show(backbone: KeyedModel, monkeypatch: pytest.MonkeyPatch):
    batch = backbone.batch(GERMAN)
    right = backbone.generate(batch, num_beams=5)
    monkeypatch.setattr(FirefoxCache, "reorder_cache", lambda *_: None)
    wrong = backbone.generate(batch, num_beams=5)
    assert right.shape != wrong.shape or not torch.equal(right, wrong)


def test_beams_keep_to_their_source():
    cache = FirefoxCache(rows_per_source=2)
    cache.cells = [torch.arange(8.0).view(4, 2)]
    cache.reorder_cache(torch.tensor([1, 1, 2, 3]))
    assert cache.cells[0].tolist() == [[2, 3], [2, 3], [4, 5], [6, 7]]
    with pytest.raises(ValueError, match=r"beam_idx is \[1, 2, 2, 3\], expected rows of the same source"):
        cache.reorder_cache(torch.tensor([1, 2, 2, 3]))


def test_sampling_is_the_same_with_and_without_cache(backbone: KeyedModel):
    batch, found = backbone.batch(GERMAN), []
    for cached in (True, False):
        torch.manual_seed(5)
        found.append(backbone.generate(batch, do_sample=True, num_return_sequences=3, use_cache=cached))
    assert torch.equal(*found)
    assert len(found[0]) == 3 * len(GERMAN) and len(found[0].unique(dim=0)) > len(GERMAN)


def test_a_prompt_and_scores_and_hidden_states_are_available(backbone: KeyedModel):
    batch = backbone.batch(GERMAN)
    free = backbone.generate(batch, max_new_tokens=8)
    options = {"output_scores": True, "output_hidden_states": True, "return_dict_in_generate": True}
    output = backbone.generate(batch, decoder_input_ids=free[:, :4], max_new_tokens=5, **options)
    assert torch.equal(output.sequences, free)
    assert len(output.scores) == 5 and output.scores[0].shape == (len(GERMAN), backbone.vocabulary_size)
    assert len(output.decoder_hidden_states[0]) == DECODER + 1
    assert len(output.encoder_hidden_states) == ENCODER + 1


def test_unknown_tokens_and_padding_are_never_produced(shared: KeyedModel):
    model, batch = shared.model, shared.batch(GERMAN)
    bias = model.lm_head.bias.detach().clone()
    unknown, pad = shared.tokenizer.unk_token_id, shared.pad_id
    assert bias[pad] == -50
    try:
        with torch.no_grad():
            model.lm_head.bias[[unknown, pad]] = 1e4
        for options in ({}, {"num_beams": 3}, {"do_sample": True}):
            tokens = shared.generate(batch, **options)[:, 1:]
            ends = (tokens == 0).cumsum(1) - (tokens == 0).int() > 0  # padding is what follows the end
            assert not ((tokens == unknown) | ((tokens == pad) & ~ends)).any()
    finally:
        with torch.no_grad():
            model.lm_head.bias.copy_(bias)


def test_decoding_begins_with_a_zero_vector_whatever_the_padding_row_holds(shared: KeyedModel, tmp_path: Path):
    batch = shared.batch(GERMAN, ENGLISH)
    copy = load_model(str(shared.name), device="cpu")
    with torch.no_grad():
        expected = shared.keys(batch)
        copy.model.model.decoder.embed_tokens.weight[copy.pad_id] = 7.0
        torch.testing.assert_close(copy.keys(batch), expected)
    assert not shared.model.lm_head.weight[shared.pad_id].any()


@pytest.mark.parametrize("which", ["attention_mask", "decoder_attention_mask"])
def test_padding_on_the_left_is_refused(backbone: KeyedModel, which: str):
    batch = backbone.batch(GERMAN)
    ids = torch.full((len(GERMAN), 3), 5)
    masks = {"attention_mask": batch.attention_mask, "decoder_attention_mask": torch.ones_like(ids)}
    masks[which] = masks[which].clone()
    masks[which][0, 0] = 0
    message = f"^{which} has a row with padding before a token, expected padding on the right only"
    with pytest.raises(ValueError, match=message):
        backbone.model(input_ids=batch.input_ids, decoder_input_ids=ids, **masks)
    if which == "attention_mask":
        with pytest.raises(ValueError, match=message):
            backbone.generate(Batch(batch.input_ids, masks[which]))
        masks[which][0, :3] = torch.tensor([1, 0, 1])
        with pytest.raises(ValueError, match=message):
            backbone.generate(Batch(batch.input_ids, masks[which]))


def test_without_a_mask_padding_is_told_by_its_id(backbone: KeyedModel):
    batch = backbone.batch(GERMAN, ENGLISH)
    ids = backbone.model.prepare_decoder_input_ids_from_labels(batch.labels)
    with torch.inference_mode():
        given = backbone.model(batch.input_ids, batch.attention_mask, ids).logits
        torch.testing.assert_close(backbone.model(batch.input_ids, decoder_input_ids=ids).logits, given)


def test_what_needs_to_go_back_is_refused(backbone: KeyedModel, folder: Path):
    batch = backbone.batch(GERMAN[:1])
    assistant = AutoModelForSeq2SeqLM.from_pretrained(folder)
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
            backbone.generate(batch, **options)
    with pytest.raises(ValueError, match="cannot go back, expected decoding without rollback"):
        FirefoxCache().crop(-1)


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized", "dynamic"])
def test_other_caches_are_refused(backbone: KeyedModel, kind: str):
    batch = backbone.batch(GERMAN[:1])
    with pytest.raises(ValueError, match=f"cache_implementation is '{kind}', expected none"):
        backbone.generate(batch, cache_implementation=kind)
    with pytest.raises(ValueError, match="past_key_values is a DynamicCache, expected a FirefoxCache or nothing"):
        backbone.generate(batch, past_key_values=DynamicCache())


def test_attention_weights_are_refused(backbone: KeyedModel):
    with pytest.raises(ValueError, match="output_attentions is True, expected False"):
        backbone.generate(backbone.batch(GERMAN), output_attentions=True, return_dict_in_generate=True)


def test_missing_inputs_are_named(backbone: KeyedModel):
    with pytest.raises(ValueError, match="decoder_input_ids and labels are missing, expected one of them"):
        backbone.model(input_ids=torch.tensor([[5, 0]]))
    with pytest.raises(ValueError, match="input_ids and encoder_outputs are missing, expected one of them"):
        backbone.model(decoder_input_ids=torch.tensor([[5]]))


# --- Training ---------------------------------------------------------------------------------------------------------


def loss_of(backbone: KeyedModel, batch: Batch, smoothing: float = 0.0) -> Tensor:
    logits = backbone.keys_and_logits(batch)[1][batch.target_mask]
    return torch.nn.functional.cross_entropy(logits, batch.labels[batch.target_mask], label_smoothing=smoothing)


def test_label_smoothing_is_finite_and_every_weight_gets_a_gradient(folder: Path):
    backbone = load_model(str(folder), device="cpu").train()
    batch = backbone.batch(GERMAN, ENGLISH)
    loss = loss_of(backbone, batch, smoothing=0.1)
    assert loss.isfinite() and loss > loss_of(backbone, batch)
    loss.backward()
    for name, weight in backbone.model.named_parameters():
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any() or name.endswith("k_proj.bias"), name  # softmax does not see a constant


def test_the_loss_with_labels_is_cross_entropy(backbone: KeyedModel):
    batch = backbone.batch(GERMAN, ENGLISH)
    with torch.inference_mode():
        output = backbone.model(batch.input_ids, batch.attention_mask, labels=batch.labels)
        torch.testing.assert_close(output.loss, loss_of(backbone, batch))


def test_dropout_is_off_by_default_and_can_be_configured(folder: Path):
    backbone = load_model(str(folder), device="cpu").train()
    batch = backbone.batch(GERMAN, ENGLISH)
    assert torch.equal(loss_of(backbone, batch), loss_of(backbone, batch))
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dropout=0.5).train()
    inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
    assert not torch.equal(model(**inputs).loss, model(**inputs).loss)
    torch.testing.assert_close(model.eval()(**inputs).loss, loss_of(backbone, batch))


@pytest.mark.parametrize("rank", [None, 2])
def test_the_last_block_is_fine_tuned_saved_untied_and_loaded_again(folder: Path, tmp_path: Path, rank: int | None):
    backbone = load_model(str(folder), device="cpu")
    before = {name: weight.clone() for name, weight in backbone.model.state_dict().items()}
    backbone.freeze_below_output(rank)
    backbone.train()
    batch = backbone.batch(GERMAN, ENGLISH)
    optimizer = torch.optim.Adam([weight for weight in backbone.parameters() if weight.requires_grad], lr=0.02)
    losses = []
    for _ in range(8):
        loss = loss_of(backbone, batch, 0.1)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    backbone.eval().save(tmp_path)
    again = load_model(str(tmp_path), device="cpu")
    assert not again.model.config.tie_word_embeddings
    assert again.output_projection.weight.data_ptr() != again.model.model.decoder.embed_tokens.weight.data_ptr()
    with torch.inference_mode():
        keys, logits = backbone.keys_and_logits(batch)
        torch.testing.assert_close(again.keys_and_logits(batch), (keys, logits), rtol=1e-4, atol=1e-5)
    for name, weight in again.model.state_dict().items():
        trained = name.startswith((f"model.decoder.layers.{DECODER - 1}.f", "lm_head"))
        if rank is not None and name.endswith("bias") and "norm" not in name:
            trained = False  # adapters stand beside weights
        assert torch.equal(weight, before[name]) != trained, name
    assert torch.equal(again.generate(batch, num_beams=3), backbone.generate(batch, num_beams=3))
    assert again.model_fingerprint != load_model(str(folder), device="cpu").model_fingerprint
    assert again.tokenizer_fingerprint == backbone.tokenizer_fingerprint


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_save_pretrained_and_from_pretrained_are_a_round_trip(tmp_path: Path, tied: bool, shared: bool):
    sizes = {"d_model": 8, "encoder_ffn_dim": 12, "decoder_ffn_dim": 12, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    sharing = {"tie_word_embeddings": tied, "share_encoder_decoder_embeddings": shared}
    model = FirefoxForConditionalGeneration(FirefoxConfig(vocab_size=30, **sizes, **heads, **sharing)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForSeq2SeqLM.from_pretrained(tmp_path)
    assert type(again) is FirefoxForConditionalGeneration
    ids = torch.tensor([[3, 4, 0], [5, 0, 29]])
    with torch.inference_mode():
        torch.testing.assert_close(again(ids, labels=ids).logits, model(ids, labels=ids).logits)
    assert again.lm_head.bias[29] == -50
    embeddings = again.model.decoder.embed_tokens.weight
    assert (again.lm_head.weight is embeddings) == tied
    assert (again.model.encoder.embed_tokens.weight is embeddings) == (tied and shared)


def test_bfloat16_decodes_like_teacher_forcing(folder: Path):
    backbone = load_model(str(folder), device="cpu", dtype="bfloat16")
    batch = backbone.batch(GERMAN)
    output = backbone.generate(batch, max_new_tokens=6, output_logits=True, return_dict_in_generate=True)
    with torch.inference_mode():
        whole = backbone.model(batch.input_ids, batch.attention_mask, output.sequences[:, :-1]).logits
    torch.testing.assert_close(torch.stack(output.logits, 1).float(), whole.float(), rtol=0.05, atol=0.05)


# --- The folder -------------------------------------------------------------------------------------------------------


def test_the_auto_classes_load_it_once_the_package_is_imported(folder: Path):
    script = (
        "import sys, lightning_knnmt.backbone.firefox\n"
        "from transformers import AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer\n"
        "kinds = (AutoConfig, AutoModelForSeq2SeqLM, AutoTokenizer)\n"
        "print(*(type(kind.from_pretrained(sys.argv[1])).__name__ for kind in kinds))\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", script, str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["FirefoxConfig", "FirefoxForConditionalGeneration", "FirefoxTokenizer"]
    for file in folder.glob("*.json"):
        assert "auto_map" not in file.read_text()


TEXTS = [
    *GERMAN, *ENGLISH, "", " ", "  two  spaces ", ">>de<< not a language code", "</s> <pad> <unk> in the text",
    "ﬁn½ — “quotes” 你好", "line\nbreak\ttab", ">> quoted <<",
]  # fmt: skip


def test_tokens_are_sentencepieces_own(folder: Path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for side, name in (("text", "source.spm"), ("text_target", "target.spm")):
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(folder / name))
        for text in TEXTS:
            ids = tokenizer(**{side: text}).input_ids
            assert ids == [*pieces.encode(text), 0], text
    for text in ENGLISH:
        ids = tokenizer(text_target=text).input_ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == pieces.decode(ids[:-1]) == text
    padded = tokenizer(GERMAN, text_target=ENGLISH, padding=True)
    assert AutoConfig.from_pretrained(folder).pad_token_id == tokenizer.pad_token_id == padded.input_ids[4][-1]


def test_the_folder_says_how_to_decode_and_where_it_comes_from(folder: Path):
    generation = GenerationConfig.from_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    assert generation.suppress_tokens == [1, config.pad_token_id]
    assert generation.decoder_start_token_id == generation.pad_token_id == config.vocab_size - 1
    assert config.max_position_embeddings == POSITIONS
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "**Source:** a test" in card and "**Licence of the weights:** unknown" in card
    record = json.loads((folder / "import.json").read_text(encoding="utf-8"))
    assert all(f"`{name}`, SHA-256 `{checksum}`" in card for name, checksum in record["files"].items())


def test_two_vocabularies_have_fingerprints_of_both(tiny_folder_of, tmp_path: Path):
    fingerprints = set()
    for target in (ENGLISH, [*ENGLISH[::-1], "Something else altogether, with other words"]):
        out = tmp_path / str(len(fingerprints))
        ship(out / "raw", GERMAN, target)
        (out / "out").mkdir()
        write_folder(ShippedFiles.of(out / "raw"), Provenance("a test"), out / "out")
        fingerprints.add(load_model(str(out / "out"), device="cpu").tokenizer_fingerprint)
    assert len(fingerprints) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_model": 7}, "d_model is 7, expected an even number of 4 or more"),
        ({"d_model": 2}, "d_model is 2, expected an even number of 4 or more"),
        ({"encoder_attention_heads": 7}, "encoder_attention_heads is 7, expected a divisor of d_model, 256"),
        ({"decoder_attention_heads": 3}, "decoder_attention_heads is 3, expected a divisor of d_model, 256"),
    ],
)
def test_impossible_sizes_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        FirefoxConfig(**options)
