"""Building a datastore beside the model's own forward pass: ``python benchmarks/build.py --quick``.

A whole build, reading, tokenizing, encoding and writing, against the bare teacher-forced forward pass of the very same
batches, already tokenized and padded. The stages are also measured one by one; in a build they overlap. Two processes
against one (`--processes 2`) say something only where there are as many idle cores or GPUs.
"""

import argparse
import io
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from itertools import islice
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.config import DatastoreConfig
from lightning_knnmt.building.datastore import build_datastore
from lightning_knnmt.building.encoder import Item, Tokenized, blocks_of, write_shard
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.boxes import box_batches
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.ranks import Processes, Ranks

GOAL = 1.15
LARGEST_PADDING = 0.05
ROOT = Path(__file__).resolve().parents[1]
BUILD, FORWARD, ENCODE = "build", "bare forward pass", "encode and write"


def make_corpus(options: argparse.Namespace, backbone: KeyedModel, path: Path) -> CorpusFile:
    """The first pairs of the corpus, or of one of random tokens with lengths as skewed as those of sentences."""
    if options.corpus is not None:
        rows = [{"src": pair.src, "tgt": pair.tgt} for pair in islice(read_pairs(options.corpus), options.pairs)]
    else:
        rng, size = np.random.default_rng(options.seed), backbone.vocabulary_size
        rows = []
        for number in range(options.pairs):
            length = 2 + min(80, int(rng.geometric(0.06)))
            lengths = (length, max(1, length + int(rng.integers(-3, 8))))
            texts = (backbone.tokenizer.decode(rng.integers(5, size, n), skip_special_tokens=True) for n in lengths)
            rows.append(dict(zip(("src", "tgt"), (f"{number} {text}" for text in texts), strict=True)))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return CorpusFile(path)


def padding(items: list[Item], batches: list[list[int]]) -> dict[str, float]:
    """Share of the batches' tokens that is padding, by side."""
    sides = {"src": [len(item.src) for item in items], "tgt": [len(item.tgt) for item in items]}
    real = {name: sum(lengths) for name, lengths in sides.items()}
    padded = {
        name: sum(len(batch) * max(lengths[row] for row in batch) for batch in batches)
        for name, lengths in sides.items()
    }
    shares = {name: 1 - real[name] / padded[name] for name in sides}
    both = 1 - sum(real.values()) / sum(padded.values())
    return {name: round(share, 4) for name, share in {**shares, "both": both}.items()}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Medians of all parts, their ratios, and the settings."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        backbone = load_model(options.model, device=options.device)
        corpus = make_corpus(options, backbone, root / "corpus.jsonl")
        sizes = {name: getattr(options, name) for name in ("max_tokens", "max_padding", "shard_pairs")}
        config = DatastoreConfig(root / "store", corpus, **sizes)
        result = measure_stages(backbone, config, options.repeats)
        if options.processes > 1:
            result |= measure_processes(options, config, sum(1 for _ in read_pairs(corpus)))
    settings = {name: value for name, value in vars(options).items() if name not in ("json", "quick", "corpus")}
    settings["corpus"] = "random tokens" if options.corpus is None else str(options.corpus.path)
    return {**result, "settings": settings, **common.environment(backbone.device)}


def measure_stages(backbone: KeyedModel, config: DatastoreConfig, repeats: int) -> dict[str, Any]:
    """A build, its stages, and the bare forward pass, in turn."""
    pairs = list(enumerate(read_pairs(config.corpus)))
    shards = list(blocks_of(Tokenized(backbone, pairs), config.shard_pairs))
    batches = [_batches(items, config) for items in shards]
    padded = [
        batch.to(backbone.device)
        for items, rows in zip(shards, batches, strict=True)
        for batch in _padded(backbone, items, rows)
    ]
    with torch.inference_mode():
        keys = [backbone.keys(batch)[batch.target_mask].half().cpu().numpy() for batch in padded]
    shutil.rmtree(config.folder, ignore_errors=True)

    def forward() -> None:
        with torch.inference_mode():
            for batch in padded:
                backbone.keys(batch)
        if backbone.device.type == "cuda":
            torch.cuda.synchronize(backbone.device)

    def pad() -> None:
        for items in shards:
            for _ in _padded(backbone, items, _batches(items, config)):
                pass

    def encode() -> None:
        for number, items in enumerate(shards):
            path = config.folder / f"shard-{number:05d}.h5"
            write_shard(backbone, items, path, config.max_tokens, config.max_padding, lambda _: None)
            file_sha256(path)

    def write() -> None:
        arrays = iter(keys)
        for number, (items, rows) in enumerate(zip(shards, batches, strict=True)):
            _write_alone(config.folder / f"shard-{number:05d}.h5", items, rows, arrays, backbone.key_size)

    work: dict[str, Callable[[], object]] = {
        FORWARD: forward,
        BUILD: lambda: build_quietly(backbone, config),
        ENCODE: encode,
        "read": lambda: sum(1 for _ in read_pairs(config.corpus)),
        "tokenize": lambda: sum(1 for _ in Tokenized(backbone, pairs)),
        "pad": pad,
        "write": write,
    }

    def prepare() -> None:
        shutil.rmtree(config.folder, ignore_errors=True)
        config.folder.mkdir()

    times = common.interleaved(work, repeats, prepare)
    medians = {name: statistics.median(values) for name, values in times.items()}
    entries = sum(map(len, keys))
    items, rows, by_length = _joined(shards, batches, config)
    return {
        "ratio": round(medians[BUILD] / medians[FORWARD], 3),
        "encode_and_write_ratio": round(medians[ENCODE] / medians[FORWARD], 3),
        "goal": GOAL,
        "padding": padding(items, rows),
        "padding_by_length_alone": padding(items, by_length),
        "largest_padding": LARGEST_PADDING,
        "entries_per_second": round(1000 * entries / medians[BUILD]),
        "entries": entries,
        "pairs": len(pairs),
        "shards": len(shards),
        "batches": len(rows),
        "median_ms": {name: round(value, 2) for name, value in medians.items()},
        "minimum_ms": {name: round(min(values), 2) for name, values in times.items()},
    }


def build_quietly(backbone: KeyedModel, config: DatastoreConfig, ranks: Ranks = Ranks()) -> None:
    """Build without a progress bar."""
    with redirect_stderr(io.StringIO()):
        build_datastore(backbone, config, ranks)


def _batches(items: list[Item], config: DatastoreConfig) -> list[list[int]]:
    src, tgt = [len(item.src) for item in items], [len(item.tgt) for item in items]
    return box_batches(src, tgt, config.max_tokens, config.max_padding)


def _padded(backbone: KeyedModel, items: list[Item], batches: list[list[int]]) -> list[Batch]:
    return [
        collate([items[row].src for row in rows], [items[row].tgt for row in rows], backbone.pad_id) for rows in batches
    ]


def _write_alone(path: Path, items: list[Item], batches: list[list[int]], keys: Any, key_size: int) -> None:
    with ShardWriter(path, sum(len(item.tgt) for item in items), len(items), key_size) as writer:
        for batch in batches:
            rows = [items[row] for row in batch]
            values = np.array([token for row in rows for token in row.tgt], np.int32)
            lengths, pairs, numbers = ([len(row.tgt) for row in rows], [row.pair for row in rows], batch)
            writer.append(next(keys), values, lengths, pairs, numbers)
    file_sha256(path)


def _joined(
    shards: list[list[Item]], batches: list[list[list[int]]], config: DatastoreConfig
) -> tuple[list[Item], list[list[int]], list[list[int]]]:
    """Items of all shards, their batches, and those that sorting by length alone would make."""
    joined: list[Item] = []
    boxes, by_length = [], []
    for items, rows in zip(shards, batches, strict=True):
        boxes += [[len(joined) + row for row in batch] for batch in rows]
        longest = [max(len(item.src), len(item.tgt)) for item in items]
        by_length += [
            [len(joined) + row for row in batch] for batch in token_budget_batches(longest, config.max_tokens)
        ]
        joined += items
    return joined, boxes, by_length


def build_as(
    rank: int, size: int, port: int, threads: int, config: DatastoreConfig, model: str, repeats: int, tell: Connection
) -> None:
    """Be one of several processes that build, and tell the seconds of each time."""
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    common.set_threads(threads)
    backbone = load_model(model)
    with Processes(devices=size).start(backbone) as ranks:
        for repeat in range(repeats + 1):
            ranks.first(lambda: shutil.rmtree(config.folder, ignore_errors=True))
            start = time.perf_counter()
            build_quietly(backbone, config, ranks)
            if rank == 0 and repeat:  # the first is a warm-up
                tell.send(time.perf_counter() - start)


def measure_processes(options: argparse.Namespace, config: DatastoreConfig, pairs: int) -> dict[str, Any]:
    """Medians of a build in one process and in several, of four shards for each of them."""
    several = options.processes
    config = replace(config, shard_pairs=1 + pairs // (4 * several))
    context = multiprocessing.get_context("spawn")
    seconds = {}
    for size in (1, several):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        receiver, sender = context.Pipe(duplex=False)
        args = (size, port, options.threads, config, options.model, options.repeats, sender)
        started = [context.Process(target=build_as, args=(rank, *args)) for rank in range(size)]
        for process in started:
            process.start()
        sender.close()
        seconds[size] = statistics.median([receiver.recv() for _ in range(options.repeats)])
        for process in started:
            process.join()
    return {
        "processes_ms": {str(size): round(1000 * value, 2) for size, value in seconds.items()},
        "processes_speedup": round(seconds[1] / seconds[several], 3),
    }


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small corpus of random tokens, fewer repeats")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--model", default=str(ROOT / "data" / "models" / "firefox-en-pt"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--corpus", type=Path, help="data/libreoffice_help/train.jsonl if it is there")
    parser.add_argument("--pairs", type=int, help="most sentence pairs; 8000, or 800 with --quick")
    parser.add_argument("--max-tokens", type=int, default=8192)
    parser.add_argument("--max-padding", type=float, default=0.04)
    parser.add_argument("--shard-pairs", type=int, default=1 << 14)
    parser.add_argument("--processes", type=int, default=1, help="also compare that many processes with one")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, help="timed repeats of each part; 7, or 3 with --quick")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    options.repeats = options.repeats or (3 if options.quick else 7)
    options.pairs = options.pairs or (800 if options.quick else 8000)
    usual = ROOT / "data" / "libreoffice_help" / "train.jsonl"
    path = options.corpus or (usual if usual.exists() and not options.quick else None)
    options.corpus = None if path is None else CorpusFile(path)
    common.set_threads(options.threads)
    result = measure(options)
    print(common.stage_table(result, "stage", FORWARD, "of the bare forward pass", 3))
    print(f"\nratio {result['ratio']} (goal {GOAL} or less)")
    print(f"without reading and tokenizing {result['encode_and_write_ratio']}")
    print(f"{result['entries_per_second']} entries/s, {result['batches']} batches of {result['pairs']} pairs")
    print(
        f"padding {result['padding']['both']} (goal {LARGEST_PADDING} or less), sorted by length alone "
        f"{result['padding_by_length_alone']['both']}"
    )
    if options.processes > 1:
        print(f"{options.processes} processes are {result['processes_speedup']} times as fast as one")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
