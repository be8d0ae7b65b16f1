"""Tiny randomly initialised language models of every family, saved as Hugging Face folders without a network."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

PAGE = """Printing
Choose File, then Print, to open the dialog. The printer that was used last is chosen.
To print one page only, enter its number: 12, for example.
Note: a printer that is not ready is shown in grey  and cannot be chosen.
Saving
Save the document before you close the window.
Choose File, then Save. The dialog asks for a name if the document has none."""
OTHER_PAGE = """Passwords
The password is wrong. Choose another password.
Choose File, then Properties, to open the dialog."""
POSITIONS = 160


def tokenizer_like(pattern: str | None, begins: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE tokenizer.

    Args:
        pattern: Regular expression of what is never merged; None: that of GPT-2.
        begins: Put a token before every text, as Llama does.
    """
    trained = Tokenizer(models.BPE())
    if pattern is None:
        trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        from tokenizers import Regex

        trained.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(pattern), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    trained.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|end|>", "<|begin|>"]
    trained.train_from_iterator(
        [PAGE, OTHER_PAGE],
        trainers.BpeTrainer(vocab_size=340, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    if begins:
        trained.post_processor = processors.TemplateProcessing(
            single="<|begin|> $A", special_tokens=[("<|begin|>", trained.token_to_id("<|begin|>"))]
        )
    named = {"bos_token": "<|begin|>"} if begins else {}
    return PreTrainedTokenizerFast(tokenizer_object=trained, eos_token="<|end|>", **named)


LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}


def make_gpt2(out: Path) -> None:
    """GPT-2, with its tokenizer's rules."""
    tokenizer = tokenizer_like(None)
    config = GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=POSITIONS, **_ids(tokenizer))
    save(GPT2LMHeadModel(config), tokenizer, out)


def make_llama(out: Path) -> None:
    """Llama 3, whose tokenizer begins every text with a token, and whose embeddings are not tied."""
    tokenizer = tokenizer_like(LLAMA_3, begins=True)
    save(LlamaForCausalLM(LlamaConfig(tie_word_embeddings=False, **_SIZES, **_ids(tokenizer))), tokenizer, out)


def make_qwen2(out: Path) -> None:
    """Qwen2, whose tokenizer has no token to begin with, and whose embeddings are tied."""
    tokenizer = tokenizer_like(LLAMA_3)
    save(Qwen2ForCausalLM(Qwen2Config(tie_word_embeddings=True, **_SIZES, **_ids(tokenizer))), tokenizer, out)


def make_qwen3(out: Path) -> None:
    """Qwen3, which normalises queries and keys."""
    tokenizer = tokenizer_like(LLAMA_3)
    save(Qwen3ForCausalLM(Qwen3Config(head_dim=6, **_SIZES, **_ids(tokenizer))), tokenizer, out)


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 8,  # for what loading adds, such as Qwen's own special tokens
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": None,
    }


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, out: Path, seed: int = 3) -> None:
    """Write a folder with random weights whose continuations are lively."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim == 1:
                weight.copy_(1 + 0.2 * noise if "norm" in name or "ln_" in name else 0.1 * noise)
            elif "embed" in name or "wte" in name or "wpe" in name:
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(1.5 * noise / weight.shape[1] ** 0.5)
    model.generation_config.max_length = None
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


TINY_CAUSAL: dict[str, Callable[[Path], None]] = {
    "gpt2": make_gpt2,
    "llama": make_llama,
    "qwen2": make_qwen2,
    "qwen3": make_qwen3,
}
