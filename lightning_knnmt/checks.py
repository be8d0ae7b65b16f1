"""Checks of options, all in the same words: what was given, what was expected."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_at_least(least: int, **options: int | None) -> None:
    """Refuse a whole number that is too small; None is no number, and passes.

    Args:
        least: The smallest that is accepted.
        options: Values by the names of their options.

    Raises:
        ValueError: One is smaller, or no whole number.

    >>> check_at_least(1, k=0)
    Traceback (most recent call last):
    ...
    ValueError: k is 0, expected 1 or more
    """
    for name, value in options.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            raise ValueError(f"{name} is {value!r}, expected {least} or more")


def check_at_most(most: int, **options: int | None) -> None:
    """Refuse a whole number that is too large; None passes.

    Args:
        most: The largest that is accepted.
        options: Values by the names of their options.

    Raises:
        ValueError: One is larger.

    >>> check_at_most(65536, k=10**11)
    Traceback (most recent call last):
    ...
    ValueError: k is 100000000000, expected 65536 or less
    """
    for name, value in options.items():
        if value is not None and value > most:
            raise ValueError(f"{name} is {value!r}, expected {most} or less")


def check_number(above_zero: bool = False, **options: float | None) -> None:
    """Refuse a number that is negative or not finite; None passes.

    Args:
        above_zero: Refuse 0 too.
        options: Values by the names of their options.

    Raises:
        ValueError: One does not fit.

    >>> check_number(above_zero=True, temperature=0)
    Traceback (most recent call last):
    ...
    ValueError: temperature is 0, expected more than 0 and finite
    """
    for name, value in options.items():
        if value is not None and (not math.isfinite(value) or value < 0 or (above_zero and value == 0)):
            raise ValueError(f"{name} is {value!r}, expected {'more than 0' if above_zero else '0 or more'} and finite")


def check_share(**options: float) -> None:
    """Refuse a number that is not within 0 and 1.

    Args:
        options: Values by the names of their options.

    Raises:
        ValueError: One does not fit.

    >>> check_share(lambda_=1.5)
    Traceback (most recent call last):
    ...
    ValueError: lambda_ is 1.5, expected 0 to 1
    """
    for name, value in options.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value!r}, expected 0 to 1")


def check_one_of(choices: Iterable[Any], **options: Any) -> None:
    """Refuse what is none of some choices.

    Args:
        choices: What is accepted.
        options: Values by the names of their options.

    Raises:
        ValueError: One is none of them.

    >>> check_one_of(("cpu", "gpu"), device="tpu")
    Traceback (most recent call last):
    ...
    ValueError: device is 'tpu', expected one of cpu, gpu
    """
    known = tuple(choices)
    for name, value in options.items():
        if value not in known:
            raise ValueError(f"{name} is {value!r}, expected one of {', '.join(map(str, known))}")


def shorten(text: str, most: int = 300) -> str:
    """A text for a message, which may be megabytes in a file from a stranger.

    >>> shorten("a" * 1000, most=4)
    'aaaa… (1000 characters)'
    """
    return text if len(text) <= most else f"{text[:most]}… ({len(text)} characters)"


def check_texts(**options: Any) -> None:
    """Refuse one text where a list of texts is expected: it would be taken letter by letter.

    Args:
        options: Values by the names of their options.

    Raises:
        TypeError: One is a string.

    >>> check_texts(sources="Guten Tag")
    Traceback (most recent call last):
    ...
    TypeError: sources is one string, 'Guten Tag', expected a list of strings: write ['Guten Tag']
    """
    for name, value in options.items():
        if isinstance(value, str):
            shown = value if len(value) <= 40 else f"{value[:40]}…"
            raise TypeError(f"{name} is one string, {shown!r}, expected a list of strings: write [{shown!r}]")


def check_types(instance: Any) -> None:
    """Refuse a dataclass of which a field has another type than it should.

    Raises:
        ValueError: Naming the field.
    """
    for name, hint in get_type_hints(type(instance)).items():
        kind = hint if isinstance(hint, UnionType) else get_origin(hint) or hint
        value = getattr(instance, name)
        if kind is Literal:
            check_one_of(get_args(hint), **{name: value})
        elif not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ValueError(f"{name} is {str(value)[:40]!r}, expected {getattr(kind, '__name__', kind)}")


def check_folder(**options: Path | None) -> None:
    """Refuse what cannot become a folder to write to; None passes.

    Args:
        options: Paths by the names of their options.

    Raises:
        ValueError: A file is in the way, or nobody may write there.

    >>> from pathlib import Path
    >>> check_folder(out=Path("/dev/null"))
    Traceback (most recent call last):
    ...
    ValueError: out is /dev/null, where /dev/null is no folder, expected a folder that is there or can be made
    """
    for option, path in options.items():
        if path is None:
            continue
        there = next(each for each in (path.absolute(), *path.absolute().parents) if os.path.lexists(each))
        if not there.is_dir():
            raise ValueError(
                f"{option} is {path}, where {there} is no folder, expected a folder that is there or can be made"
            )
        if not os.access(there, os.W_OK | os.X_OK):
            raise ValueError(f"{option} is {path}, expected a folder to write to, but {there} may not be written to")


def refuse_existing(overwrite: bool, **options: Path) -> None:
    """Refuse to write in the place of something, unless that is asked for.

    Args:
        overwrite: Whether it is.
        options: Paths by the names of their options.

    Raises:
        ValueError: There is something.
    """
    for option, path in options.items():
        if not overwrite and os.path.lexists(path):
            raise ValueError(f"{option} is {path}, which is there already; name another, or give --overwrite true")
