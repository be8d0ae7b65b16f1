"""Texts to token ids, on the source and on the target side."""

from collections.abc import Sequence
from typing import Any, Literal

import transformers


class FSMTTokenizer(transformers.FSMTTokenizer):
    """FSMT's tokenizer, which in Hugging Face reads targets with the vocabulary and the rules of the source language.

    It keeps its parent's name, so that a saved folder loads without this package.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._source_side = self.encoder, self.src_lang
        self._target_side = {token: index for index, token in self.decoder.items()}, self.tgt_lang

    def _switch_to_input_mode(self) -> None:
        self.encoder, self.src_lang = self._source_side

    def _switch_to_target_mode(self) -> None:
        self.encoder, self.src_lang = self._target_side


def token_ids(
    tokenizer: Any, side: Literal["text", "text_target"], texts: Sequence[str], limit: int | None
) -> tuple[list[list[int]], int]:
    """Token ids of each text, special tokens included, and how many texts were cut to `limit` tokens."""
    ids: list[list[int]] = tokenizer(**{side: list(texts)}, verbose=False).input_ids
    cut = [] if limit is None else [row for row, tokens in enumerate(ids) if len(tokens) > limit]
    if cut:
        options = {side: [texts[row] for row in cut], "truncation": True, "max_length": limit}
        for row, tokens in zip(cut, tokenizer(**options).input_ids, strict=True):
            ids[row] = tokens
    return ids, len(cut)
