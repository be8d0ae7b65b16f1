"""Texts in, texts out: greedy and beam search over mixtures."""

from lightning_knnmt.decoding.translator import Decoding, Translations, Translator, mixing

__all__ = ["Decoding", "Translations", "Translator", "mixing"]
