"""Checks of the options that the dispersion losses share, worded with the option's own name."""

import math
from collections.abc import Iterable


def check_at_least(name: str, value: int, minimum: int) -> None:
    """Check a count.

    Raises:
        ValueError: If `value` is no integer or below `minimum`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{name}={value!r}: expected an integer of at least {minimum}; change {name}.")


def check_number(name: str, value: float, above_zero: bool) -> None:
    """Check a finite number that is positive (`above_zero`) or at least not negative.

    Raises:
        ValueError: If it is not.
    """
    if not math.isfinite(value) or value < 0 or (above_zero and value == 0):
        wanted = "above 0" if above_zero else "of at least 0"
        raise ValueError(f"{name}={value!r}: expected a finite number {wanted}; change {name}.")


def check_one_of(name: str, value: str, options: Iterable[str]) -> None:
    """Check a choice.

    Raises:
        ValueError: If `value` is none of `options`.
    """
    options = tuple(options)
    if value not in options:
        raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(repr, options))}; change {name}.")
