"""What `build_index.py plan` predicts beside what building takes: ``python benchmarks/plan.py --quick``.

For each size a plan is made and a datastore built, in turn, each in a process of its own, so that the peak of its
memory is its own. On a busy machine `--clock cpu` measures both in processor time instead, in which waiting for other
programs does not count.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import time
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import common

from lightning_knnmt.data.readers import CorpusFile, read_pairs

GOAL = 0.2
ROOT = Path(__file__).resolve().parents[1]
LIBREOFFICE = ROOT / "data" / "libreoffice_help" / "train.jsonl"
SHOWN = 0.05  # seconds under which a stage's ratio says nothing
JUDGED = 0.5  # seconds from which on a stage should meet the goal


def first_pairs(corpus: Path, pairs: int, path: Path) -> None:
    """Write the first pairs of a corpus to a file."""
    rows = (vars_of(pair) for pair in islice(read_pairs(CorpusFile(corpus)), pairs))
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def vars_of(pair: Any) -> dict[str, str]:
    """A pair as a row of JSONL."""
    return {"src": pair.src, "tgt": pair.tgt, "document": pair.document}


def predict_one(options: argparse.Namespace, corpus: Path, folder: Path) -> dict[str, float]:
    """The plan's figures; runs in a process of its own."""
    from lightning_knnmt.backbone.config import load_model
    from lightning_knnmt.building.datastore import DatastoreConfig
    from lightning_knnmt.building.plan import make_plan
    from lightning_knnmt.index.config import IndexConfig

    start = time.perf_counter()
    datastore = DatastoreConfig(folder, CorpusFile(corpus), shard_pairs=options.shard_pairs)
    index = IndexConfig(options.factory)
    plan = make_plan(load_model(options.model, device="cpu"), datastore, index, sample_pairs=options.sample_pairs)
    figures: dict[str, float] = {
        "entries": plan.size.entries,
        "pairs": plan.size.pairs,
        "shards": len(plan.size.shards),
        "datastore bytes": plan.disk.keys + plan.disk.values + plan.disk.texts,
        "index bytes": plan.disk.index,
        "peak memory bytes": plan.memory.peak,
        **{f"{stage.name} s": stage.seconds for stage in plan.stages},
        "in all s": plan.whole.seconds,
        "planning s": time.perf_counter() - start,
    }
    return figures


def build_one(options: argparse.Namespace, corpus: Path, folder: Path) -> dict[str, float]:
    """The same figures of a build; runs in a process of its own."""
    from build_index import build
    from lightning_knnmt.backbone.config import load_model
    from lightning_knnmt.building.datastore import DatastoreConfig
    from lightning_knnmt.datastore import Manifest
    from lightning_knnmt.evaluation.report import read_build
    from lightning_knnmt.index.config import IndexConfig
    from lightning_knnmt.timing import peak_memory_mb

    datastore = DatastoreConfig(folder, CorpusFile(corpus), shard_pairs=options.shard_pairs)
    model = load_model(options.model, device="cpu")
    start = time.perf_counter()
    loaded: Any = SimpleNamespace(load=lambda: model)  # loading takes no part of the time
    build(loaded, datastore, IndexConfig(options.factory))
    seconds = time.perf_counter() - start
    record, manifest = read_build(folder), Manifest.load(folder)
    stages = {"encode": record["encode"]["seconds"], **record["indexes"]["index"]["seconds"]}
    stages["report"] = seconds - sum(stages.values())
    return {
        "entries": manifest.entries,
        "pairs": manifest.pairs,
        "shards": len(manifest.shards),
        "datastore bytes": sum((folder / shard.file).stat().st_size for shard in manifest.shards),
        "index bytes": sum(file.stat().st_size for file in folder.glob("index*.faiss")),
        "peak memory bytes": (1 << 20) * (peak_memory_mb() or 0),
        **{f"{name} s": value for name, value in stages.items()},
        "in all s": seconds,
    }


def run(work: str, options: argparse.Namespace, corpus: Path, folder: Path, tell: Any) -> None:
    """Be a process of one's own, and tell the figures."""
    if options.clock == "cpu":
        time.perf_counter = time.process_time
    common.set_threads(options.threads)
    tell.send({"plan": predict_one, "build": build_one}[work](options, corpus, folder))


def apart(work: str, options: argparse.Namespace, corpus: Path, folder: Path) -> dict[str, float]:
    """What `run` tells."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run, args=(work, options, corpus, folder, sender))
    process.start()
    sender.close()
    try:
        figures: dict[str, float] = receiver.recv()
    except EOFError:
        raise SystemExit(f"the process that was to {work} has failed") from None
    process.join()
    return figures


def medians(runs: list[dict[str, float]]) -> dict[str, float]:
    """Of each figure."""
    return {name: statistics.median(figures[name] for figures in runs) for name in runs[0]}


def table(result: dict[str, Any]) -> str:
    """The result as a Markdown table."""
    rows = ["| pairs | figure | predicted | actual | predicted / actual |", "|---|---|---|---|---|"]
    for size in result["sizes"]:
        for name, actual in size["actual"].items():
            predicted = size["predicted"].get(name, 0.0)
            said = actual and not (name.endswith(" s") and actual < SHOWN)
            ratio = f"{predicted / actual:.3f}" if said else ""
            rows.append(f"| {size['actual']['pairs']:,} | {name} | {predicted:,.5g} | {actual:,.5g} | {ratio} |")
    return "\n".join(rows)


def beyond(result: dict[str, Any]) -> list[str]:
    """The figures that are more than the goal off; stages that take next to no time do not count."""
    found = []
    for size in result["sizes"]:
        for name, actual in size["actual"].items():
            if not actual or (name.endswith(" s") and actual < JUDGED):
                continue
            if abs(size["predicted"].get(name, 0.0) / actual - 1) > GOAL:
                found.append(f"{name} of {size['actual']['pairs']:,} pairs")
    return found


def main() -> None:
    """Predict, build, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--model", default=str(ROOT / "data" / "models" / "firefox-en-pt"))
    parser.add_argument("--corpus", type=Path, default=LIBREOFFICE)
    parser.add_argument("--pairs", type=int, nargs="+", help="sizes; 10000 36000, or 1000 3000 with --quick")
    parser.add_argument("--sample-pairs", type=int, help="2000, or 500 with --quick")
    parser.add_argument("--repeats", type=int, default=1, help="of each plan and build, taken in turn; medians count")
    parser.add_argument("--factory", default="auto")
    parser.add_argument("--shard-pairs", type=int, default=1 << 14)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    options.pairs = options.pairs or ([1000, 3000] if options.quick else [10_000, 36_000])
    options.sample_pairs = options.sample_pairs or (500 if options.quick else 2000)
    sizes: list[dict[str, Any]] = []
    for pairs in options.pairs:
        with tempfile.TemporaryDirectory() as folder:
            corpus = Path(folder) / "corpus.jsonl"
            first_pairs(options.corpus, pairs, corpus)
            runs: dict[str, list[dict[str, float]]] = {"plan": [], "build": []}
            for repeat in range(options.repeats):
                for work, figures in runs.items():
                    figures.append(apart(work, options, corpus, Path(folder) / f"store-{repeat}"))
            predicted, actual = medians(runs["plan"]), medians(runs["build"])
            sizes.append({"predicted": predicted, "actual": actual, "runs": runs})
    settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
    result = {"sizes": sizes, "goal": GOAL, "settings": settings, **common.environment()}
    print(table(result))
    off = beyond(result)
    print(f"\nmore than {GOAL:.0%} off (stages from {JUDGED} s on): {', '.join(off) if off else 'none'}")
    print("planning took " + ", ".join(f"{size['predicted']['planning s']:.1f} s" for size in sizes))
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
