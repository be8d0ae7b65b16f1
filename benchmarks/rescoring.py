"""Candidates of short codes scored again from the stored shards, against an index that stores the keys again (Refine).

``OMP_WAIT_POLICY=PASSIVE python benchmarks/rescoring.py --entries 700000 --key-size 256 --folder runs/rescoring-256``
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import common
import numpy as np
import stores

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.rescoring import rescore

CANDIDATES = 4  # for each neighbor, as Refine's k_factor


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Microseconds per query of both, and the share of exact neighbors that each finds."""
    clumps = stores.Clumps(options.key_size)
    store = stores.synthetic_store(folder, clumps, options.entries)
    for name, end in (("codes", ""), ("refine", ",Refine(SQfp16)")):
        build_index(store, IndexConfig(f"IVF{options.nlist},PQ{options.codes}x4fs{end}", name=name))
    codes, refine, keys = open_index(store, "codes"), open_index(store, "refine"), MappedKeys(store)
    queries = clumps.queries(options.queries)
    rows = []
    for index in (codes, refine):
        index.set_nprobe(options.nprobe)

    for k in options.k:
        exact = stores.exact_neighbors(store, queries[:256], k)[1]

        def from_shards(asked: np.ndarray, k: int = k) -> np.ndarray:
            return rescore(asked, codes.search(asked, CANDIDATES * k)[1], keys, k)[1]

        def from_copy(asked: np.ndarray, k: int = k) -> np.ndarray:
            return refine.search(asked, k)[1]

        ways = {"codes alone": lambda asked, k=k: codes.search(asked, CANDIDATES * k)[1], "refine": from_copy,
                "shards": from_shards}  # fmt: skip
        recall = {
            name: float(np.mean([np.isin(a[:k], b).mean() for a, b in zip(way(queries[:256]), exact, strict=True)]))
            for name, way in ways.items()
        }
        for batch in options.batch:
            blocks = [queries[first : first + batch] for first in range(0, len(queries) - batch + 1, batch)]
            blocks = blocks[: max(2, options.timed // batch)]

            def run(way: Any, blocks: list[np.ndarray] = blocks) -> None:
                for block in blocks:
                    way(block)

            work: dict[str, Callable[[], object]] = {name: partial(run, way) for name, way in ways.items()}
            times = common.interleaved(work, options.repeats, lambda: None)
            asked = sum(map(len, blocks))
            micros = {name: 1000 * statistics.median(each) / asked for name, each in times.items()}
            rows.append({"k": k, "batch": batch, "us_per_query": {name: round(v, 1) for name, v in micros.items()},
                         "ratio": round(micros["shards"] / micros["refine"], 3), "recall": recall})  # fmt: skip
            print(rows[-1], flush=True)
    sizes = {name: sum(file.stat().st_size for file in folder.glob(f"{name}*.faiss")) / len(store)
             for name in ("codes", "refine")}  # fmt: skip
    return {"rows": rows, "bytes_per_entry": sizes, "settings": vars(options), **common.environment()}


def main() -> None:
    """Measure, print, and write the figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--entries", type=int, default=700_000)
    parser.add_argument("--key-size", type=int, default=256)
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--codes", type=int, default=64, help="sub-quantizers")
    parser.add_argument("--nprobe", type=int, default=8)
    parser.add_argument("--k", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--queries", type=int, default=4096)
    parser.add_argument("--timed", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="where the store is kept; a temporary one by default")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    common.set_threads(1)
    with ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())) / "store"
        result = measure(options, folder)
    if options.json is not None:
        common.write_json(options.json, {**result, "settings": {k: str(v) for k, v in result["settings"].items()}})


if __name__ == "__main__":
    main()
