"""Language codes of multilingual tokenizers, and the tokens that decoding begins with."""

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel


@dataclass(frozen=True)
class DecoderStart:
    """How every translation begins.

    Attributes:
        start_id: The decoder's input before anything is predicted.
        forced_id: The first token after it, where the language is to be forced; None: the model predicts it.
    """

    start_id: int
    forced_id: int | None


def set_languages(tokenizer: Any, name: str, src_lang: str | None, tgt_lang: str | None) -> None:
    """Check the language codes against the tokenizer of the model `name` and make it use them.

    Raises:
        ValueError: A code is missing, unknown, or given to a tokenizer without languages.
    """
    codes = {"src_lang": src_lang, "tgt_lang": tgt_lang}
    known = _language_codes(tokenizer)
    for option, code in codes.items():
        if code and not known:
            raise ValueError(f"{option} is {code!r}, but the tokenizer of {name!r} has no languages; leave it out")
        if known and not code:
            raise ValueError(f"{option} is missing: {name!r} is multilingual, expected {_suggest(known, code)}")
        if code and code not in known:
            raise ValueError(
                f"{option} is {code!r}, which the tokenizer of {name!r} does not know, expected {_suggest(known, code)}"
            )
    if known and getattr(tokenizer, "legacy_behaviour", False):
        raise ValueError(f"the tokenizer of {name!r} has legacy_behaviour on, which misplaces languages; turn it off")
    if known:
        tokenizer.src_lang, tokenizer.tgt_lang = src_lang, tgt_lang


def check_target_prefix(tokenizer: Any, name: str, src_prefix: str) -> None:
    """Refuse to leave the target language of a multi-target Marian model to chance.

    Raises:
        ValueError: No source begins with one of the languages that the model `name` knows, such as `>>por<<`.
    """
    known = getattr(tokenizer, "supported_language_codes", [])
    if known and not any(src_prefix.startswith(code) for code in known):
        raise ValueError(
            f"src_prefix is {src_prefix!r}, but {name!r} translates into several languages, expected one of "
            f"{', '.join(sorted(known))}"
        )


def decoder_start(model: PreTrainedModel, tokenizer: Any, tgt_lang: str | None) -> DecoderStart:
    """How decoding has to begin so that it continues what teacher forcing showed.

    M2M100, NLLB and mBART-50 labels begin with the language, so it is forced as first token. mBART-25 labels end with
    it, and it stands in the place of the decoder's start token. Models such as BART force a token of their own.

    Raises:
        ValueError: The model does not say which token its decoder starts with.
    """
    start_id = model.generation_config.decoder_start_token_id
    if start_id is None:
        start_id = getattr(model.config, "decoder_start_token_id", None)
    forced_id = model.generation_config.forced_bos_token_id
    if tgt_lang:
        forced_id = None
        first, *_, last = tokenizer(text_target="").input_ids
        language_id = tokenizer.convert_tokens_to_ids(_language_token(tokenizer, tgt_lang))
        if last == language_id:
            start_id = language_id
        elif first == language_id:
            forced_id = language_id
        else:
            raise ValueError(f"the tokenizer of {model.name_or_path!r} does not mark its targets with {tgt_lang!r}")
    if start_id is None:
        raise ValueError(f"model {model.name_or_path!r} has no decoder_start_token_id in its config; set it there")
    return DecoderStart(start_id, forced_id)


def _language_codes(tokenizer: Any) -> list[str]:
    """All language codes of a tokenizer, empty if it has no notion of languages."""
    if not hasattr(tokenizer, "set_tgt_lang_special_tokens"):
        return []
    if hasattr(tokenizer, "lang_code_to_id"):  # M2M100, mBART-25 and mBART-50
        return sorted(tokenizer.lang_code_to_id)
    return sorted(map(str, tokenizer.extra_special_tokens))  # NLLB


def _language_token(tokenizer: Any, code: str) -> str:
    """The token of a language code: `__de__` for M2M100, the code itself for NLLB and mBART."""
    return getattr(tokenizer, "lang_code_to_token", {}).get(code, code)


def _suggest(known: list[str], code: str | None) -> str:
    """Codes that begin like the one given, or else all of them."""
    return "one of " + ", ".join([other for other in known if code and other[:2] == code[:2].lower()] or known)
