"""How many sentences are decoded at a time, chosen by measured throughput."""

from collections.abc import Sequence

DEFAULT = 32
LEAST, MOST = 8, 256  # sentences at a time that are tried
SENTENCES = 4  # of a trial, for each that is decoded at a time: most of them take the place of others


class BatchSize:
    """Doubles the number of sentences that are decoded at a time until it brings no more tokens a second.

    The first trial is a warm-up, and is repeated. Where texts end before trials do, the default is kept unless a larger
    number was found to be faster.
    """

    def __init__(self) -> None:
        self._best, self._rate = 0, 0.0
        self._next: int | None = LEAST
        self._warm = False

    @property
    def best(self) -> int:
        """What the rest is decoded with."""
        return self._best if self._next is None else max(self._best, DEFAULT)

    def next(self, left: int) -> int | None:
        """The number to try with `SENTENCES` times as many sentences; None if so many are not left, or all is known.

        Args:
            left: Sentences that are not translated yet.
        """
        return None if self._next is None or SENTENCES * self._next > left else self._next

    def record(self, tokens: int, seconds: float) -> None:
        """What the number that was tried has brought."""
        assert self._next is not None, "next comes first"
        if not self._warm:
            self._warm = True
            return
        rate = tokens / max(seconds, 1e-9)
        if rate <= self._rate:
            self._next = None
        else:
            self._best, self._rate = self._next, rate
            self._next = 2 * self._next if 2 * self._next <= MOST else None


def evenly(order: Sequence[int], count: int) -> tuple[list[int], list[int]]:
    """Some of the numbers of sentences, of all lengths if they are ordered by length, and the rest; both in order.

    Args:
        order: Numbers of sentences.
        count: How many, no more than there are.

    >>> evenly([5, 3, 8, 1], 2)
    ([5, 8], [3, 1])
    """
    places = {place * len(order) // count for place in range(count)}
    return (
        [number for place, number in enumerate(order) if place in places],
        [number for place, number in enumerate(order) if place not in places],
    )
