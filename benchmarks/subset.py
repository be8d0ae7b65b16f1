"""Search in the tokens of similar sentences beside search in the whole store: ``python benchmarks/subset.py --quick``.

A store of random codes (IVF,PQ with 8 bits, the field's default), in which searching costs what it costs with any codes
of that number, and with ``--store FOLDER`` a datastore as it is, with its sentence index. One step is R = sentences ×
beams rows; finding the sentences is measured apart, since it happens once for each of them.
"""

import argparse
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common
import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_knnmt.index.codes import stored_codes
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.layers import inverted_lists
from lightning_knnmt.knn.memory import consecutive
from lightning_knnmt.knn.product_codes import ProductCodes
from lightning_knnmt.knn.retrievers.subset import Subset
from lightning_knnmt.knn.step import Step, sentences_of_rows
from lightning_knnmt.memory import open_memory
from lightning_knnmt.sentences.dense import DenseSentences

LENGTH = 20  # tokens of a stored sentence
ENCODED = 384  # dimensions of its vector, as all-MiniLM-L6-v2 has


class RandomEncoder:
    """Vectors that mean nothing."""

    name = fingerprint = "random"

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Shape (N, ENCODED)."""
        return torch.nn.functional.normalize(torch.randn(len(texts), ENCODED), dim=1)


class RandomMemory:
    """Random codes in random lists, in sentences of LENGTH entries."""

    metric = "l2"

    def __init__(self, entries: int, key_size: int, nlist: int, pieces: int, rng: np.random.Generator) -> None:
        self.index = FaissIndex(random_index(entries, key_size, nlist, pieces, rng))
        found = stored_codes(self.index)
        assert found is not None
        parts: dict[str, Any] = {name: None if p is None else torch.from_numpy(p) for name, p in vars(found).items()}
        self.codes, self.key_size = ProductCodes(**parts), key_size
        self.vectors = torch.cat([RandomEncoder().encode([""] * 10_000).half()] * -(-entries // LENGTH // 10_000))

    def open_sentences(self, name: str, model: object) -> DenseSentences:
        """Random vectors."""
        return DenseSentences(self.vectors[: len(self.index) // LENGTH], RandomEncoder())

    def entries_of(self, sentences: NDArray[np.int64]) -> Tensor:
        """LENGTH entries each."""
        starts = LENGTH * torch.from_numpy(sentences)
        return consecutive(starts, starts + LENGTH)

    def product_codes(self) -> ProductCodes:
        """The codes."""
        return self.codes

    def values_of(self, ids: Tensor) -> Tensor:
        """Some token."""
        return ids % 32000

    def weights_of(self, ids: Tensor) -> None:
        """Every entry stands for itself."""


def random_index(entries: int, key_size: int, nlist: int, pieces: int, rng: np.random.Generator) -> faiss.IndexIVFPQ:
    """An IVF,PQ index whose centroids, codewords and codes are random."""
    centroids = rng.normal(size=(nlist, key_size)).astype(np.float32)
    quantizer = faiss.IndexFlatL2(key_size)
    quantizer.add(centroids)
    index = faiss.IndexIVFPQ(quantizer, key_size, nlist, pieces, 8)
    index.own_fields = True
    quantizer.this.disown()  # type: ignore[attr-defined]
    faiss.copy_array_to_vector(
        rng.normal(size=pieces * 256 * (key_size // pieces)).astype(np.float32), index.pq.centroids
    )
    index.is_trained = True
    index.precompute_table()
    lists = rng.integers(0, nlist, entries)
    order = np.argsort(lists, kind="stable")
    bounds = np.searchsorted(lists[order], np.arange(nlist + 1))
    for number in range(nlist):
        ids = order[bounds[number] : bounds[number + 1]].astype(np.int64)
        codes = rng.integers(0, 256, (len(ids), pieces), dtype=np.uint8)
        inverted_lists(index).add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    index.ntotal = entries
    return index


def measured(
    memory: Any, retrievers: dict[str, Subset], whole: dict[str, Any], queries: Tensor, texts: list[str], repeats: int
) -> dict[str, Any]:
    """Microseconds for each row and step of all kinds of search, and milliseconds to begin a sentence with a subset."""
    model: Any = SimpleNamespace(device=torch.device("cpu"))
    batch: Any = SimpleNamespace(source_texts=texts)
    step = Step(queries, torch.zeros(len(queries), 1), sentences_of_rows(len(queries), len(texts)))
    begin = {}
    work = dict(whole)
    for name, retriever in retrievers.items():
        retriever.bind(model, memory)
        start = time.perf_counter()
        retriever.begin(batch)
        begin[name] = 1000 * (time.perf_counter() - start) / len(texts)
        work[name] = lambda retriever=retriever: retriever(step)
    times = common.interleaved(work, repeats, lambda: None)
    micro = {name: 1000 * statistics.median(values) / len(queries) for name, values in times.items()}
    return {
        "us_per_row": {name: round(value, 1) for name, value in micro.items()},
        "begin_ms_per_sentence": {name: round(value, 2) for name, value in begin.items()},
    }


@torch.inference_mode()
def synthetic(options: argparse.Namespace) -> dict[str, Any]:
    """The store of random codes."""
    rng = np.random.default_rng(options.seed)
    memory = RandomMemory(options.entries, options.key_size, options.nlist, options.pieces, rng)
    shape = options.sentences * options.beams, options.key_size
    queries = torch.from_numpy(rng.normal(size=shape).astype(np.float32))
    rows = queries.numpy()
    whole = {f"whole store, nprobe {nprobe}": lambda nprobe=nprobe: memory.index.search(rows, options.k, nprobe)
             for nprobe in (8, 32)}  # fmt: skip
    subsets = {f"subset of {n} sentences": Subset(options.k, n) for n in (32, 128, 512)}
    found = measured(memory, subsets, whole, queries, ["text"] * options.sentences, options.repeats)
    micro = found["us_per_row"]
    return found | {
        "ratio": round(micro["whole store, nprobe 32"] / micro["subset of 512 sentences"], 3),
        "entries": options.entries,
        "index": f"IVF{options.nlist},PQ{options.pieces} of random codes",
    }


@torch.inference_mode()
def real(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """A datastore as it is: its own sources are translated again, with queries near its keys."""
    rng = np.random.default_rng(options.seed)
    with open_memory(folder) as memory:
        sources = list(memory.sources())
        texts = [sources[number] for number in rng.choice(len(sources), options.sentences, replace=False)]
        entries = torch.from_numpy(rng.choice(len(memory), options.sentences * options.beams, replace=False))
        queries = memory.keys_of(entries)
        queries += 0.3 * queries.std() * torch.from_numpy(rng.normal(size=queries.shape).astype(np.float32))
        whole = {f"whole store, nprobe {nprobe}": lambda nprobe=nprobe: memory.search(queries, options.k, nprobe)
                 for nprobe in (8, 32)}  # fmt: skip
        name = options.sentence_index
        subsets = {f"subset of {n} sentences": Subset(options.k, n, name) for n in (32, 128, 512)}
        subsets["subset of 512 sentences, 64 rescored"] = Subset(options.k, 512, name, max(64, options.k))
        found = measured(memory, subsets, whole, queries, texts, options.repeats)
        report = memory.report
    micro = found["us_per_row"]
    return found | {
        "ratio": round(micro["whole store, nprobe 8"] / micro["subset of 512 sentences"], 3),
        "entries": len(memory),
        "index": None if report is None else report.factory,
    }


def table(results: dict[str, dict[str, Any]]) -> str:
    """Microseconds for each row of a step, a row for each kind of search."""
    lines = ["| store | search | µs for each row and step | ms to begin a sentence |", "|---|---|---|---|"]
    for store, found in results.items():
        for name, micro in found["us_per_row"].items():
            begin = found["begin_ms_per_sentence"].get(name, "")
            lines.append(f"| {store}: {found['entries']} entries, {found['index']} | {name} | {micro} | {begin} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--entries", type=int, default=10_000_000)
    parser.add_argument("--key_size", type=int, default=256)
    parser.add_argument("--nlist", type=int, default=4096)
    parser.add_argument("--pieces", type=int, default=64, help="sub-quantizers M, a byte each")
    parser.add_argument("--sentences", type=int, default=32)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--store", type=Path, action="append", default=[], help="a datastore, as often as you like")
    parser.add_argument("--sentence_index", default="sentences", help="of those datastores")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="200,000 entries")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.entries, options.nlist, options.repeats = 200_000, 512, 3
    common.set_threads(options.threads)
    results = {"random codes": synthetic(options)}
    results |= {str(folder): real(folder, options) for folder in options.store}
    print(table(results))
    if options.json is not None:
        settings = {name: value for name, value in vars(options).items() if name not in ("json", "quick")}
        content = {"ratio": results["random codes"]["ratio"], "stores": results, "settings": settings}
        common.write_json(options.json, content | common.environment())


if __name__ == "__main__":
    main()
