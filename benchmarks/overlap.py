"""Whether a step gains by searching while the projection is computed: ``python benchmarks/overlap.py --quick``.

The search for neighbors needs the queries alone, not the logits: it can run in a thread of its own beside the output
projection and its log-sum-exp. Both one after the other, together, and the projection compiled by `torch.compile`, in
turn. The headline `ratio` is the time of both together ÷ one after the other.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from tiny_setting import make_setting
from torch import Tensor

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.decoding.projection import Projection
from lightning_knnmt.memory import open_memory


def compiled(project: Callable[[Tensor], Tensor], states: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, str]:
    """A compiled projection, or None, and how long compiling took or why it failed."""
    start = time.perf_counter()
    try:
        fast: Callable[[Tensor], Tensor] = torch.compile(project, dynamic=True)
        fast(states)
    except Exception as error:  # no compiler, or one that refuses: torch names both in errors of its own
        return None, f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return fast, f"{time.perf_counter() - start:.1f} s"


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of each way and their ratios."""
    common.set_threads(options.threads)
    model = load_model(str(options.model), device="cpu")
    projection = Projection(model)
    with open_memory(options.store) as memory, ThreadPoolExecutor(1, "search") as thread, torch.inference_mode():
        entries = np.random.default_rng(options.seed).choice(len(memory), (options.repeats + 1, options.rows))
        drawn = [memory.keys_of(torch.from_numpy(rows)).float() for rows in entries]
        noise = torch.Generator().manual_seed(options.seed)
        queries = [rows + 0.1 * rows.std() * torch.randn(rows.shape, generator=noise) for rows in drawn]

        def project(states: Tensor) -> Tensor:
            return projection(states).float().logsumexp(1)

        def search(states: Tensor) -> None:
            memory.search(states, options.k, options.nprobe)

        def in_turn(states: Tensor) -> None:
            project(states)
            search(states)

        def together(states: Tensor) -> None:
            found = thread.submit(search, states)
            project(states)
            found.result()

        ways: dict[str, Callable[[Tensor], object]] = {
            "projection": project,
            "search": search,
            "one after the other": in_turn,
            "together": together,
        }
        fast, told = compiled(lambda states: model.project(states).float().logsumexp(1), queries[0])
        if fast is not None:
            ways["projection, compiled"] = fast
        turns = cycle(queries)

        def timed(run: Callable[[Tensor], object]) -> Callable[[], object]:
            return lambda: run(next(turns))

        work = {name: timed(run) for name, run in ways.items()}
        times = common.interleaved(work, options.repeats, lambda: None)
    medians = {name: statistics.median(each) for name, each in times.items()}
    return {
        "ratio": round(medians["together"] / medians["one after the other"], 3),
        "compiling": told,
        "median_ms": {name: round(value, 3) for name, value in medians.items()},
        "minimum_ms": {name: round(min(each), 3) for name, each in times.items()},
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("json", "quick")},
        **common.environment(),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print, and write all figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and store, made on the spot")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"), help="the imported model")
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"), help="its datastore")
    for name, value in (("rows", 128), ("k", 64), ("nprobe", 8), ("repeats", 200), ("threads", 2), ("seed", 1)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.model, _, options.store = make_setting(Path(folder), options.seed)
            options.rows, options.k, options.repeats = 16, 8, 5
        result = measure(options)
    print(common.stage_table(result, "way", "one after the other", "of one after the other", 2))
    print(f"ratio {result['ratio']} of together to one after the other; compiling: {result['compiling']}")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
