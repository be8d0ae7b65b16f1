"""What the benchmarks share; importing it lets them run from any folder without installing the package."""

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lightning_knnmt.evaluation.report import environment
from lightning_knnmt.storage.files import write_json

__all__ = ["environment", "interleaved", "set_threads", "stage_table", "write_json"]


def interleaved(
    work: dict[str, Callable[[], object]], repeats: int, prepare: Callable[[], object]
) -> dict[str, list[float]]:
    """Milliseconds of each piece of work, taken in turn so that a slow moment of the machine strikes all of them."""
    times: dict[str, list[float]] = {name: [] for name in work}
    for repeat in range(repeats + 1):
        for name, run in work.items():
            prepare()
            start = time.perf_counter()
            run()
            if repeat:  # the first is a warm-up
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def set_threads(threads: int) -> None:
    """Limit the threads of all libraries."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def stage_table(result: dict[str, Any], stage: str, base: str, share: str, digits: int) -> str:
    """Median and minimum of each stage as a Markdown table, beside one of them.

    Args:
        result: With `median_ms` and `minimum_ms`, by stage.
        stage: Head of the first column.
        base: The stage that all are divided by.
        share: Head of that column.
        digits: Its decimals.
    """
    rows = [f"| {stage} | median ms | minimum ms | {share} |", "|---|---|---|---|"]
    for name, median in result["median_ms"].items():
        ratio = median / result["median_ms"][base]
        rows.append(f"| {name} | {median:.1f} | {result['minimum_ms'][name]:.1f} | {ratio:.{digits}f} |")
    return "\n".join(rows)
