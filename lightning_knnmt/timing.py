"""Named spans of time, and the most memory."""

import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Spans:
    """Seconds and counts by name; work queued on a GPU is waited for."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)

    @contextmanager
    def span(self, name: str, count: int = 1) -> Iterator[None]:
        """Add the duration of the block to a name."""
        start = now()
        try:
            yield
        finally:
            self.seconds[name] += now() - start
            self.counts[name] += count

    def share_of_rows(self, name: str) -> float:
        """Rows that a part was done for, of all rows that a gate saw or, without one, that had neighbors; 0 if none."""
        rows = self.counts.get("gate", 0) or self.counts.get(name, 0) + self.counts.get("followed", 0)
        return self.counts.get(name, 0) / rows if rows else 0.0


def now() -> float:
    """Seconds on a clock that only goes forward, after the GPU has caught up."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory_mb() -> int | None:
    """The most memory that this process has held so far, in MB; None on Windows, which does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak / (1 << 20 if sys.platform == "darwin" else 1 << 10))
