"""Cleaning: what is stripped from a pair, what is dropped, and that everything dropped is counted."""

import random
from collections import Counter
from xml.sax.saxutils import escape

import pytest

from lightning_knnmt.data.cleaning import Cleaning, strip_accelerators, strip_markup
from lightning_knnmt.data.pairs import Pair

GOOD = Pair("Klicken Sie auf Speichern.", "Click on Save.", "Seite")


def clean(*pairs: Pair, **options: object) -> tuple[list[Pair], dict[str, int]]:
    dropped: Counter[str] = Counter()
    kept = list(Cleaning(**options)(pairs, dropped))  # type: ignore[arg-type]
    return kept, dict(dropped)


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        ('Siehe <a href="x?a=1&amp;b=2">diese <b class=c>Seite</b></a>.', "Siehe diese Seite."),
        ("Zeile<br/>\n\tZeile", "Zeile Zeile"),
        ("5 &lt; 6 &amp; 7 &#62; 6 &#x2026;", "5 < 6 & 7 > 6 …"),
        ("&Auml;ndern&nbsp;Sie", "Ändern Sie"),
        ("3 < 4 und 5 > 4", "3 < 4 und 5 > 4"),
        ("wenn a <3 und b> 2", "wenn a <3 und b> 2"),
        ("A & B", "A & B"),
        ("  \u00a0 ", ""),
    ],
)
def test_markup_goes_and_what_only_looks_like_it_stays(raw: str, text: str) -> None:
    assert strip_markup(raw) == text


def test_escaped_text_comes_back_as_it_was() -> None:
    rng = random.Random(5)
    for _ in range(200):
        text = " ".join("".join(rng.choices("aß€&;<>\"'#x1", k=rng.randint(1, 8))) for _ in range(4))
        assert strip_markup(f"<p id='7'>{escape(text)}</p>") == text


@pytest.mark.parametrize("mark", ["&", "_", "~"])
def test_an_accelerator_is_stripped_only_where_both_sides_have_one(mark: str) -> None:
    assert strip_accelerators(f"Datei {mark}öffnen", f"Open fi{mark}le") == ("Datei öffnen", "Open file")
    for src, tgt in [
        (f"Datei {mark}öffnen", "Open file"),
        (f"{mark}Datei {mark}öffnen", f"{mark}Open file"),
        (f"Suchen {mark} Ersetzen", f"Find {mark} Replace"),
        (f"Suchen {mark} Ersetzen", f"{mark}Find and replace"),
    ]:
        assert strip_accelerators(src, tgt) == (src, tgt)


@pytest.mark.parametrize(
    ("src", "tgt", "reason"),
    [
        ("<b>&nbsp;</b>", "Text here", "no letters"),
        ("100 %", "100 %", "no letters"),
        ("Wort " * 7, "word " * 8, "too many words"),
        ("a" * 61, "b" * 3, "length ratio"),
        ("a" * 10, "b" * 61, "length ratio"),
        ("leave this alone", "leave this alone", "not translated"),
        ("<i>leave this</i> alone", "leave this  alone", "not translated"),
    ],
)
def test_each_reason_to_drop_is_counted_under_its_name(src: str, tgt: str, reason: str) -> None:
    assert clean(GOOD, Pair(src, tgt), GOOD, max_words=7) == ([GOOD, GOOD], {reason: 1})


@pytest.mark.parametrize(
    ("src", "tgt"),
    [
        ("a" * 60, "b" * 3),  # sides under 20 characters count as 20
        ("a" * 90, "b" * 30),
        ("OK Cancel", "OK Cancel"),
        ("eins zwei drei vier fünf sechs sieben", "one"),
    ],
)
def test_pairs_at_the_limits_stay(src: str, tgt: str) -> None:
    assert clean(Pair(src, tgt, "d"), max_words=7) == ([Pair(src, tgt, "d")], {})


def test_what_is_switched_off_is_not_done() -> None:
    pairs = [Pair("<b>&Datei</b> bleibt so", "<b>&Datei</b> bleibt so", "d"), Pair("a" * 900, "b")]
    kept = clean(*pairs, markup=False, accelerators=False, drop_identical=False, max_length_ratio=1000.0)
    assert kept == (pairs, {})


def test_every_pair_is_kept_or_counted() -> None:
    rng = random.Random(3)
    words = ["<b>", "12", "Haus", "house", "&amp;", "_x", "ein", "sehr", "langes", "a" * 70]
    pairs = [Pair(*(" ".join(rng.choices(words, k=rng.randint(0, 9))) for _ in range(2)), "d") for _ in range(500)]
    kept, dropped = clean(*pairs, max_words=6)
    assert len(kept) + sum(dropped.values()) == len(pairs)
    assert {"no letters", "too many words", "length ratio"} <= dropped.keys()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length_ratio": 0.5}, r"max_length_ratio is 0\.5, expected 1 or more"),
        ({"max_length_ratio": float("nan")}, "max_length_ratio is nan, expected 1 or more"),
        ({"max_words": 0}, "max_words is 0, expected 1 or more"),
    ],
)
def test_impossible_limits_are_refused(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Cleaning(**options)  # type: ignore[arg-type]
