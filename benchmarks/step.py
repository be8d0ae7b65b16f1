"""Cost of one kNN decoding step beside the search alone: ``python benchmarks/step.py --quick``.

Retrieval and mixing, from the queries and the model's logits to the logits of the mixture, against `search` of the very
same FAISS index. The reference mixes as most systems do: both distributions over the whole vocabulary, then a log.
"""

import argparse
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import faiss
import numpy as np
import torch
from stores import make_store
from torch import Tensor

from lightning_knnmt.building.index import build_index
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory

GOAL = 1.3


class OfNoModel(DatastoreMemory):
    """A memory whose keys no model has made."""

    def check(self, model: object) -> None:
        """Take any model."""


def dense_reference(logits: Tensor, neighbors: Neighbors, lambda_: float, temperature: float) -> Tensor:
    """log(λ p_kNN + (1 − λ) p_NMT) over the whole vocabulary, shape (R, V)."""
    weights = torch.softmax(-neighbors.distances / temperature, -1)
    knn = torch.zeros_like(logits).scatter_add_(1, neighbors.values, weights)
    return (lambda_ * knn + (1 - lambda_) * torch.softmax(logits, -1)).log()


def one_hot_reference(logits: Tensor, neighbors: Neighbors, lambda_: float, temperature: float) -> Tensor:
    """The same with a [R, K, V] tensor of each neighbor's distribution."""
    weights = torch.softmax(-neighbors.distances / temperature, -1)
    spread = logits.new_zeros(*neighbors.values.shape, logits.shape[1])  # [R, K, V]
    knn = spread.scatter_(2, neighbors.values.unsqueeze(2), weights.unsqueeze(2)).sum(1)
    return (lambda_ * knn + (1 - lambda_) * torch.softmax(logits, -1)).log()


def open_index_of(memory: DatastoreMemory) -> faiss.Index:
    """FAISS's own index, searched as the latest search has left it."""
    assert isinstance(memory.index, FaissIndex)
    return memory.index.index


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of all parts, their ratio, and the settings."""
    rng, generator = np.random.default_rng(options.seed), torch.Generator().manual_seed(options.seed)
    logits = 3 * torch.randn(options.queries, options.vocabulary, generator=generator)
    combiner = FixedCombiner(options.lambda_, options.temperature)
    with (
        tempfile.TemporaryDirectory() as folder,
        make_store(Path(folder), options.entries, options.key_size, options.vocabulary, rng) as store,
        torch.inference_mode(),
    ):
        build_index(store, IndexConfig(options.factory))
        memory, retriever = OfNoModel(store, open_index(store)), WholeStore(options.k, options.nprobe)
        model: Any = SimpleNamespace(device=torch.device("cpu"))
        mixture = Mixture(model, memory, retriever, combiner)
        chosen = rng.choice(options.entries, options.queries, replace=False)
        queries = store.sample_keys(options.entries)[chosen]
        queries += rng.normal(size=queries.shape, scale=0.5).astype(np.float32)
        states = torch.from_numpy(queries)
        rows = torch.arange(options.queries)  # [row -> sentence]
        neighbors = retriever(Step(states, logits, rows))
        given = logits.clone()  # the model makes new logits at every step, which mixing may overwrite
        mixing = (options.lambda_, options.temperature)
        work: dict[str, Callable[[], object]] = {
            "search alone": lambda: open_index_of(memory).search(queries, options.k),
            "retrieve and mix": lambda: mixture(Step(states, given, rows, writable=True)),
            "mix": lambda: combiner(Step(states, given, rows, writable=True), neighbors),
            "dense reference: retrieve and mix": lambda: dense_reference(
                given, retriever(Step(states, given, rows)), *mixing
            ),
            "dense reference: mix": lambda: dense_reference(given, neighbors, *mixing),
        }
        times = common.interleaved(work, options.repeats, lambda: given.copy_(logits))
        threshold, faiss.cvar.distance_compute_blas_threshold = faiss.cvar.distance_compute_blas_threshold, 128_000
        times["search alone with FAISS's own threshold of BLAS"] = common.interleaved(
            {"search": work["search alone"]}, min(3, options.repeats), lambda: None
        )["search"]
        faiss.cvar.distance_compute_blas_threshold = threshold
        small = slice(0, max(1, options.queries // 16))  # [R, K, V] of all rows would be gigabytes
        few = Neighbors(neighbors.distances[small], neighbors.values[small], neighbors.ids[small])
        times["one-hot reference: mix, 1/16 of the queries"] = common.interleaved(
            {"mix": lambda: one_hot_reference(logits[small], few, *mixing)}, min(3, options.repeats), lambda: None
        )["mix"]
        mixed = combiner(Step(states, logits, rows), neighbors).log_softmax(-1)
        difference = float((mixed - dense_reference(logits, neighbors, *mixing)).abs().max())
    medians = {name: statistics.median(values) for name, values in times.items()}
    search = medians["search alone"]
    return {
        "ratio": round(medians["retrieve and mix"] / search, 3),
        "goal": GOAL,
        "reference_ratio": round(medians["dense reference: retrieve and mix"] / search, 3),
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "minimum_ms": {name: round(min(values), 2) for name, values in times.items()},
        "largest_difference_of_log_probabilities": difference,
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "quick")},
        **common.environment(),
    }


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--factory", default="Flat", help="FAISS factory string")
    parser.add_argument("--nprobe", type=int, default=8, help="lists probed, where the index has lists")
    for name, value in (("queries", 256), ("entries", 100_000), ("key_size", 256), ("vocabulary", 42_000), ("k", 64)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=100.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="timed repeats of each part; 41, or 15 with --quick")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.repeats = options.repeats or (15 if options.quick else 41)
    common.set_threads(options.threads)
    result = measure(options)
    print(common.stage_table(result, "one decoding step", "search alone", "of search alone", 2))
    print(f"\nratio {result['ratio']} (goal {GOAL} or less), the dense reference's {result['reference_ratio']}")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
