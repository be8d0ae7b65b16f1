"""The tokenizer of Firefox Translations models: SentencePiece and nothing else."""

from typing import Any

from transformers import MarianTokenizer


class FirefoxTokenizer(MarianTokenizer):
    """Marian's tokenizer over the model's own SentencePiece files, whose ids are theirs for every text.

    OPUS-MT's conventions, which Marian's tokenizer follows, are left out: no text is a language code (`>>pt<<`) or a
    special token (`</s>`), and Moses has no part in it.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("split_special_tokens", True)
        super().__init__(*args, **options)

    def _setup_normalizer(self) -> None:
        self.punc_normalizer = str

    def remove_language_code(self, text: str) -> tuple[list[str], str]:
        """The text as it is."""
        return [], text
