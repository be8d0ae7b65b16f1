"""A tiny Llama written as a .gguf file loads as the model that it was made from."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_causal import OTHER_PAGE, PAGE, make_llama
from transformers import AutoTokenizer, LlamaForCausalLM

from lightning_knnmt.backbone.causal import CausalModel
from lightning_knnmt.backbone.config import load_model

gguf = pytest.importorskip("gguf", reason="needs the package gguf, which writes and reads such files")


def write_gguf(folder: Path, path: Path) -> None:
    """Write a saved Llama as llama.cpp's converter does, in float32."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    vocabulary = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens = [vocabulary.get(index, f"<|unused-{index}|>") for index in range(config.vocab_size)]
    kinds = [3 if token.startswith("<|") else 1 for token in tokens]  # control tokens and ordinary ones
    merges = [" ".join(merge) for merge in _merges(tokenizer)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_add_bos_token(True)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    for name, weight in model.state_dict().items():
        inside = name.removesuffix(".weight")
        block = ""
        if inside.startswith("model.layers."):
            _, _, number, inside = inside.split(".", 3)
            block = f"blk.{number}."
        heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
        values = weight.numpy()
        if inside in heads:  # llama.cpp turns neighboring dimensions, Hugging Face those half a head apart
            halves = values.reshape(heads[inside], 2, -1, values.shape[1])
            values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(f"{block}{names[inside]}.weight", np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _merges(tokenizer: Any) -> list[list[str]]:
    import json

    return json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[CausalModel, CausalModel]:
    """The model of a folder, and that of the .gguf file made of it."""
    root = tmp_path_factory.mktemp("gguf")
    make_llama(root / "llama")
    write_gguf(root / "llama", root / "tiny.gguf")
    plain, packed = (load_model(str(root / name), device="cpu") for name in ("llama", "tiny.gguf"))
    assert isinstance(plain, CausalModel)
    assert isinstance(packed, CausalModel)
    return plain, packed


def test_logits_are_those_of_the_model_that_was_written(pair: tuple[CausalModel, CausalModel]):
    plain, packed = pair
    texts = ["Choose File", ""], [", then Print", OTHER_PAGE]
    batch = plain.batch(*texts)
    with torch.inference_mode():
        torch.testing.assert_close(packed(batch), plain(batch), rtol=1e-4, atol=1e-4)
    assert packed.dtype == "float32"
    assert packed.position_limit == plain.position_limit


def test_texts_are_read_and_written_again(pair: tuple[CausalModel, CausalModel]):
    _, packed = pair
    ids = packed.tokenize(["", "Choose File"], [PAGE[:100], ", then Print"])
    assert packed.tokenizer.batch_decode(ids.tgt) == [PAGE[:100], ", then Print"]
    assert ids.src[0] == [packed.tokenizer.bos_token_id]
    assert packed.generate(packed.batch(["Save", ""]), max_new_tokens=4, num_beams=1).shape[0] == 2


def test_fingerprint_is_that_of_the_file(pair: tuple[CausalModel, CausalModel], tmp_path: Path):
    _, packed = pair
    copy = tmp_path / "copy.gguf"
    content = Path(packed.name).read_bytes()
    copy.write_bytes(content)
    assert load_model(str(copy), device="cpu").model_fingerprint == packed.model_fingerprint
    copy.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert load_model(str(copy), device="cpu").model_fingerprint != packed.model_fingerprint


def test_a_saved_gguf_model_is_an_ordinary_folder(pair: tuple[CausalModel, CausalModel], tmp_path: Path):
    _, packed = pair
    packed.save(tmp_path / "saved")
    again = load_model(str(tmp_path / "saved"), device="cpu")
    batch = packed.batch(["Choose File", ""], [", then Print", OTHER_PAGE])
    with torch.inference_mode():
        torch.testing.assert_close(again(batch), packed(batch))
    assert again.tokenize(["", "a"], [PAGE[:90], " b"]) == packed.tokenize(["", "a"], [PAGE[:90], " b"])
