"""What greedy and beam search go by, as Hugging Face's `generate` understands it."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

# Options of `generate` that are honoured here, and settings of a model that must be unset for that.
OWN_OPTIONS = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "early_stopping", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty", "suppress_tokens",
})  # fmt: skip
FOREIGN_SETTINGS = (
    "do_sample", "guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "stop_strings",
    "max_time", "penalty_alpha", "watermarking_config", "renormalize_logits",
)  # fmt: skip


@dataclass(frozen=True)
class SearchOptions:
    """What decides the outcome of a search.

    Attributes:
        beams: Beam size; 1 is greedy.
        max_new_tokens: Longest translation.
        eos_ids: Tokens that end one, shape (number,).
        pad_id: What follows its end.
        length_penalty: Power of the length that scores are divided by.
        early_stopping: As in `generate`.
        banned: Tokens that are never produced, shape (number,).
        processors: Other rules of Hugging Face, for log-probabilities of shape (R, V).
    """

    beams: int
    max_new_tokens: int
    eos_ids: Tensor
    pad_id: int
    length_penalty: float
    early_stopping: bool | str
    banned: Tensor
    processors: LogitsProcessorList


def search_options(model: Any, options: dict[str, Any], beams: int, max_new_tokens: int) -> SearchOptions | None:
    """The options of this search; None if something is asked for that only `generate` can do.

    Args:
        model: The Hugging Face model, with its generation configuration.
        options: Of `generate`, which override that.
        beams: Beam size.
        max_new_tokens: Longest translation.
    """
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **options})
    unset = all(getattr(config, name, None) in (None, False, 0, 1) for name in FOREIGN_SETTINGS)
    if set(options) - OWN_OPTIONS or not unset or config.eos_token_id is None or config.use_cache is False:
        return None
    config.num_beams, config.max_new_tokens, config.max_length = beams, max_new_tokens, 1 + max_new_tokens
    eos_ids = torch.tensor(config.eos_token_id, device=model.device).reshape(-1)
    config._eos_token_tensor = eos_ids
    banned: list[int] = []
    others = LogitsProcessorList()
    for processor in model._get_logits_processor(
        config, 1, logits_processor=LogitsProcessorList(), device=model.device
    ):
        if type(processor) is SuppressTokensLogitsProcessor:
            banned += config.suppress_tokens
        elif type(processor) is NoBadWordsLogitsProcessor and all(len(word) == 1 for word in config.bad_words_ids):
            banned += [word[0] for word in config.bad_words_ids if word[0] not in eos_ids.tolist()]
        else:
            others.append(processor)
    pad_id = config.pad_token_id
    if pad_id is None or (pad_id == 0 and beams > 1):  # beam search of `generate` takes 0 for none
        pad_id = int(eos_ids[0])
    return SearchOptions(
        beams=beams,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=False if config.early_stopping is None else config.early_stopping,
        banned=torch.tensor(sorted(set(banned)), dtype=torch.long, device=model.device),
        processors=others,
    )
