"""Tiny random models in the files that Firefox Translations ships, written here and independently of the reader."""

import struct
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import yaml

Weights = dict[str, np.ndarray]

D, HEADS, FFN, ENCODER, DECODER = 24, 4, 32, 2, 2
ATTENTION = ("Wq", "Wk", "Wv", "Wo", "bq", "bk", "bv", "bo", "Wo_ln_scale", "Wo_ln_bias")
OPTIONS: dict[str, Any] = {
    "type": "transformer",
    "dim-emb": D,
    "enc-depth": ENCODER,
    "dec-depth": DECODER,
    "dec-cell": "ssru",
    "transformer-decoder-autoreg": "rnn",
    "transformer-heads": HEADS,
    "transformer-dim-ffn": FFN,
    "transformer-ffn-depth": 2,
    "transformer-ffn-activation": "relu",
    "transformer-preprocess": "",
    "transformer-postprocess": "dan",
    "transformer-postprocess-emb": "d",
    "transformer-postprocess-top": "",
    "transformer-train-position-embeddings": False,
    "transformer-tied-layers": [],
    "tied-embeddings-all": True,
}


def train_vocabulary(texts: list[str], path: Path, size: int = 90) -> int:
    """Write a SentencePiece model with `</s>` at 0 and `<unk>` at 1, and return its number of tokens."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_prefix=str(path.with_suffix("")),
        vocab_size=size,
        hard_vocab_limit=False,
        bos_id=-1,
        eos_id=0,
        unk_id=1,
        minloglevel=2,
        num_threads=1,
    )
    path.with_suffix(".vocab").unlink()
    path.with_suffix(".model").rename(path)
    return len(sentencepiece.SentencePieceProcessor(model_file=str(path)))


def random_weights(tokens: int, target_tokens: int | None = None, untied: bool = False, seed: int = 3) -> Weights:
    """Weights of a model whose translations vary over steps, sentences and beams; two numbers: two vocabularies."""
    generator = np.random.default_rng(seed)
    weights: Weights = {}

    def add(name: str, *shape: int, gain: float = 1.0) -> None:
        noise = generator.standard_normal(shape)
        if "ln_scale" in name:
            noise = 1 + 0.2 * noise
        elif shape[0] == 1:
            noise *= 0.1
        else:
            noise *= gain * shape[0] ** -0.5
        weights[name] = noise.astype(np.float32)

    def attention(prefix: str, gain: float) -> None:
        for part in ATTENTION:
            add(f"{prefix}_{part}", D if part in ("Wq", "Wk", "Wv", "Wo") else 1, D, gain=gain)

    def feed_forward(prefix: str) -> None:
        add(f"{prefix}_ffn_W1", D, FFN, gain=1.5)
        add(f"{prefix}_ffn_b1", 1, FFN)
        add(f"{prefix}_ffn_W2", FFN, D, gain=1.5)
        for part in ("ffn_b2", "ffn_ffn_ln_scale", "ffn_ffn_ln_bias"):
            add(f"{prefix}_{part}", 1, D)

    for number in range(1, ENCODER + 1):
        attention(f"encoder_l{number}_self", 1.0)
        feed_forward(f"encoder_l{number}")
    for number in range(1, DECODER + 1):
        attention(f"decoder_l{number}_context", 1.2)
        feed_forward(f"decoder_l{number}")
        for part in ("rnn_W", "rnn_Wf"):
            add(f"decoder_l{number}_{part}", D, D, gain=2.0)
        for part in ("rnn_bf", "rnn_ffn_ln_scale", "rnn_ffn_ln_bias"):
            add(f"decoder_l{number}_{part}", 1, D)
    sides = {"Wemb": tokens} if target_tokens is None else {"encoder_Wemb": tokens, "decoder_Wemb": target_tokens}
    for name, rows in sides.items():
        weights[name] = (0.3 * D**-0.5 * generator.standard_normal((rows, D))).astype(np.float32)
    outputs = target_tokens or tokens
    if untied:
        add("decoder_ff_logit_out_W", D, outputs, gain=1.5)
    weights["decoder_ff_logit_out_b"] = (0.1 * generator.standard_normal((1, outputs))).astype(np.float32)
    return weights


def quantise(values: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """int8 values and their quantMult, as intgemm does."""
    scale = np.float32(127 / np.abs(values).max())
    return np.clip(np.rint(values * scale), -127, 127).astype(np.int8), scale


def is_matrix(name: str, values: np.ndarray) -> bool:
    """Whether Marian quantises a weight."""
    return len(values) > 1 and ("_W" in name or name.endswith("Wemb"))


def dequantised(weights: Weights) -> Weights:
    """What is left of the weights after quantisation."""
    quantised = {name: quantise(values) for name, values in weights.items() if is_matrix(name, values)}
    return weights | {name: values.astype(np.float32) / scale for name, (values, scale) in quantised.items()}


def items_of(weights: Weights, options: dict[str, Any], int8: bool) -> list[tuple[bytes, int, tuple[int, ...], bytes]]:
    """Name, type, shape and data of everything in a `.bin`."""
    items = []
    for name, values in weights.items():
        kind, shape, data = 0x0404, values.shape, values.astype("<f4").tobytes()
        if int8 and is_matrix(name, values):
            quantised, scale = quantise(values)
            stored = quantised if name.endswith("Wemb") else quantised.T
            kind, data = 0x4101, np.ascontiguousarray(stored).tobytes() + struct.pack("<f", scale)
            items.append((f"{name}_QuantMultA".encode(), 0x0404, (1, 1), struct.pack("<f", 9.5)))
        items.append((name.encode(), kind, shape, data))
    text = yaml.safe_dump(options).encode() + b"\0"
    return [*items, (b"special:model.yml", 0x0101, (len(text),), text)]


def write_bin(path: Path, weights: Weights, options: dict[str, Any] = OPTIONS, int8: bool = True) -> Path:
    """Write a Marian binary."""
    items = items_of(weights, options, int8)
    padded = [data if kind == 0x0101 else data + bytes(-len(data) % 256) for _, kind, _, data in items]
    content = struct.pack("<QQ", 1, len(items))
    for (name, kind, shape, _), data in zip(items, padded, strict=True):
        content += struct.pack("<4Q", len(name) + 1, kind, len(shape), len(data))
    content += b"".join(name + b"\0" for name, *_ in items)
    content += b"".join(struct.pack(f"<{len(shape)}i", *shape) for _, _, shape, _ in items)
    skip = -(len(content) + 8) % 256
    path.write_bytes(content + struct.pack("<Q", skip) + bytes(skip) + b"".join(padded))
    return path


def write_npz(path: Path, weights: Weights, options: dict[str, Any] = OPTIONS) -> Path:
    """Write a Marian `.npz`."""
    text = np.frombuffer(yaml.safe_dump(options).encode() + b"\0", dtype=np.int8)
    np.savez(path, **weights, **{"special:model.yml": text})
    return path


def write_shortlist(path: Path, lists: list[list[int]], frequent: int = 4) -> Path:
    """Write a binary shortlist with the target ids of each source id."""
    offsets = np.cumsum([0, *map(len, lists)]).astype("<u8")
    ids = np.array([token for row in lists for token in sorted(row)], dtype="<u4")
    rest = struct.pack("<4Q", frequent, 50, len(offsets), len(ids)) + offsets.tobytes() + ids.tobytes()
    seed = 0
    for (value,) in struct.iter_unpack("<Q", rest[: len(rest) // 8 * 8]):
        seed ^= (value + 0x9E3779B9 + (seed << 6) + (seed >> 2)) % 2**64
    path.write_bytes(struct.pack("<QQ", 0xF11A48D5013417F5, seed) + rest)
    return path


def ship(
    folder: Path, texts: list[str], target_texts: list[str] | None = None, int8: bool = True, seed: int = 3
) -> Weights:
    """Write a folder as Firefox ships it, with two vocabularies if there are target texts; returns its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    if target_texts is None:
        source = target = train_vocabulary(texts, folder / "vocab.xxyy.spm")
        weights = random_weights(source, seed=seed)
    else:
        source = train_vocabulary(texts, folder / "srcvocab.xxyy.spm", 80)
        target = train_vocabulary(target_texts, folder / "trgvocab.xxyy.spm", 60)
        weights = random_weights(source, target, seed=seed)
    write_bin(folder / "model.xxyy.intgemm.alphas.bin", weights, int8=int8)
    write_shortlist(folder / "lex.50.50.xxyy.s2t.bin", [[token % target] for token in range(source)])
    return dequantised(weights) if int8 else weights
