"""What the benchmarks share; importing it lets them run from any folder without installing the package."""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import faiss
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


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


def processor() -> str:
    """The processor's name."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def set_threads(threads: int) -> None:
    """Limit the threads of all libraries."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)


def environment() -> dict[str, Any]:
    """Threads, versions and machine, to stand beside every figure."""
    return {
        "threads": {"torch": torch.get_num_threads(), "faiss": faiss.omp_get_max_threads()},
        "versions": {name: version(name) for name in ("torch", "numpy")} | {"faiss": faiss.__version__},
        "machine": {"platform": platform.platform(), "processor": processor(), "python": platform.python_version()},
    }


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


def write_json(path: Path, content: Any) -> None:
    """Write figures to a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
