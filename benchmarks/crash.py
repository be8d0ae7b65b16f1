"""Builds that are killed and run again: ``python benchmarks/crash.py --quick``.

A process that builds a small datastore and its index is killed (SIGKILL) at a random moment of a chosen stage; then the
same build runs again. The store must be identical to one that was never interrupted: shards, manifest and index byte by
byte, the description of the index but for the time that building took. Whole shards must not be written again.

Builds of two processes are killed, too: one of them, upon which the other must end by itself, or both. One process or
two, by chance, build the rest. So are the commands build, append, remove and compact of build_index.py, at any time.

Without --quick there are 1,000 kills, which take about half an hour.
"""

import argparse
import functools
import json
import multiprocessing
import os
import random
import re
import socket
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from hashlib import sha256
from itertools import cycle, islice
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import common
from scratch_model import ModelShape, init_model
from tqdm import tqdm

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.building import index as index_builder
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.encoder import ShardWriter
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import PartialFile
from lightning_knnmt.storage.layout import BUILDING
from lightning_knnmt.storage.ranks import Processes

STAGES = ("encode", "train", "add", "merge", "write")
TOGETHER = {"rank 0 of 2": (0,), "rank 1 of 2": (1,), "both of 2": (0, 1)}  # [stage -> ranks that are killed]
SIZE = 2
GRACE = 120  # seconds in which a process must have noticed that another is gone
PAUSE = 0.004  # seconds that each step of a build is drawn out, so that a kill can fall into it
INDEX = IndexConfig("IVF4,PQ4x4fs,Refine(SQfp16)", chunk=60, part_entries=200)
NOT_COMPARED = ("writer.lock",)  # who wrote last


@dataclass(frozen=True)
class Work:
    """What a process builds.

    Attributes:
        model: Folder of the model.
        corpus: JSONL file.
        shard_pairs: Pairs of a shard.
    """

    model: Path
    corpus: Path
    shard_pairs: int = 12

    def build(self, folder: Path, stages: Connection | None = None, processes: Processes = Processes()) -> None:
        """Build the store, telling each step's stage where asked; runs in a process of its own."""
        common.set_threads(1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # progress bars
        tqdm.set_lock(threading.RLock())  # its own is shared among processes, and would outlive a killed one
        if stages is not None:
            _draw_out(stages.send)
        config = DatastoreConfig(folder, CorpusFile(self.corpus), max_tokens=200, shard_pairs=self.shard_pairs)
        backbone = load_model(str(self.model), device="cpu")
        with processes.start(backbone) as ranks:
            build_datastore(backbone, config, ranks)
            with Datastore(folder) as store:
                build_index(store, INDEX, ranks)

    def build_as(self, rank: int, port: int, folder: Path, stages: Connection | None = None) -> None:
        """Build the store together with another process, as if Lightning or a cluster had started both."""
        os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        self.build(folder, stages, Processes(devices=SIZE))


def _draw_out(tell: Callable[[str], None]) -> None:
    """Make each step of a build tell its stage and last a little longer."""

    def drawn_out(stage: str, step: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(step)
        def slow(*args: Any) -> Any:
            tell(stage)
            time.sleep(PAUSE)
            result = step(*args)
            time.sleep(PAUSE)
            return result

        return slow

    ShardWriter.append = drawn_out("encode", ShardWriter.append)  # type: ignore[method-assign]
    index_builder.train = drawn_out("train", index_builder.train)
    index_builder.merge = drawn_out("merge", index_builder.merge)
    PartialFile.finish = drawn_out("write", PartialFile.finish)  # type: ignore[method-assign]
    chunks = Datastore.key_chunks

    def slow_chunks(store: Datastore, chunk: int, entries: range | None = None) -> Any:
        for keys in chunks(store, chunk, entries):
            tell("add")
            yield keys
            time.sleep(PAUSE)

    Datastore.key_chunks = slow_chunks  # type: ignore[method-assign, assignment]


@dataclass(frozen=True)
class Outcome:
    """What one kill led to.

    Attributes:
        stage: Where the process was.
        step: Which step of that stage it had begun, from 1.
        kept: Whole shards that it left.
        problems: What was different from an uninterrupted build, in words.
    """

    stage: str
    step: int
    kept: int
    problems: list[str]


class Crashes:
    """Kills builds of one piece of work.

    Args:
        work: What is built.
        root: An empty folder.
        seed: Of the moments.
    """

    def __init__(self, work: Work, root: Path, seed: int = 1) -> None:
        self.work, self.root, self.random = work, root, random.Random(seed)
        self.context = _forking()
        self.whole = root / "whole"
        process, stages = self.start(work.build, self.whole)
        self.steps = Counter(_told(stages))  # [stage -> steps of a whole build]
        process.join()
        if process.exitcode != 0 or set(self.steps) != set(STAGES):
            raise RuntimeError(f"the uninterrupted build ended with {process.exitcode} after {dict(self.steps)}")
        self.expected = contents(self.whole)

    def start(self, target: Callable[..., object], *args: Any) -> tuple[Any, Connection]:
        """Run something in a process of its own; its last argument is a pipe, whose other end is returned."""
        receiver, sender = self.context.Pipe(duplex=False)
        process = self.context.Process(target=target, args=(*args, sender))
        process.start()
        sender.close()
        return process, receiver

    @functools.cached_property
    def steps_together(self) -> list[int]:
        """Steps of a whole build of two processes, those of each."""
        folder = self.root / "together"
        started = self.start_together(folder)
        steps = [len(_told(stages)) for _, stages in started]
        for process, _ in started:
            process.join()
        if wrong := differences(contents(folder), self.expected):
            raise RuntimeError(f"after the uninterrupted build of {SIZE} processes {', '.join(wrong)}")
        return steps

    def start_together(self, folder: Path) -> list[tuple[Any, Connection]]:
        """Start a build of two processes, by rank."""
        port = free_port()
        return [self.start(self.work.build_as, rank, port, folder) for rank in range(SIZE)]

    def kill(self, stage: str) -> Outcome:
        """Kill a build in a stage, or some of its processes at any time, run it again, and compare."""
        folder, together = self.root / "killed", stage in TOGETHER
        killed = TOGETHER.get(stage, (0,))
        while True:
            step = self.random.randint(1, self.steps_together[killed[0]] if together else self.steps[stage])
            started = self.start_together(folder) if together else [self.start(self.work.build, folder)]
            stages, begun = started[killed[0]][1], 0
            try:
                while begun < step:
                    begun += stages.recv() == stage or together
                time.sleep(self.random.uniform(0, 2.5 * PAUSE))
            except EOFError:
                pass
            for rank in killed:
                started[rank][0].kill()
            problems = _end([process for process, _ in started])
            if all(started[rank][0].exitcode < 0 for rank in killed):
                break
            _remove(folder)  # it was faster than the signal
        if any(process.exitcode == 0 for process, _ in started) and contents(folder) != self.expected:
            problems.append("a process ended without an error, though the store is not whole")
        kept = _stamps(folder)
        problems += self._opens_only_whole(folder)
        problems += self.run_again(folder, together and self.random.random() < 0.5)
        if any(_stamp(folder / name) != stamp for name, stamp in kept.items()):
            problems.append("a whole shard was written again")
        _remove(folder)
        return Outcome(stage, step, len(kept), problems)

    def run_again(self, folder: Path, together: bool = False) -> list[str]:
        """Build to the end, and say in words how the store differs from one that was never interrupted."""
        port, process = free_port(), self.context.Process
        alone = [process(target=self.work.build, args=(folder,))]
        both = [process(target=self.work.build_as, args=(rank, port, folder)) for rank in range(SIZE)]
        again = both if together else alone
        for each in again:
            each.start()
        for each in again:
            each.join()
        problems = [f"running again ended with {each.exitcode}" for each in again if each.exitcode]
        return problems + differences(contents(folder), self.expected) + [str(problem) for problem in verify(folder)]

    def _opens_only_whole(self, folder: Path) -> list[str]:
        """A store that opens after the kill is the whole one."""
        try:
            with Datastore(folder) as store:
                return [] if store.manifest == Manifest.load(self.whole) else ["another store opens after the kill"]
        except DatastoreError:
            return []


def free_port() -> int:
    """A port at which two processes can find each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def _end(processes: list[Any]) -> list[str]:
    """Wait for processes, and say in words which of them did not end by themselves."""
    problems = []
    for rank, process in enumerate(processes):
        process.join(GRACE)
        if process.is_alive():
            process.kill()
            process.join()
            problems.append(f"rank {rank} did not end")
    return problems


def _forking() -> Any:
    """Processes that begin with everything imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([Path(__file__).stem, "lightning.fabric"])
    before, here = os.environ.get("PYTHONPATH"), Path(__file__).resolve().parent
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
    return context


def _told(stages: Connection) -> list[str]:
    told = []
    try:
        while True:
            told.append(stages.recv())
    except EOFError:
        return told


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Identity and time of the shards that count as whole."""
    for name in (BUILDING, "manifest.json"):
        try:
            return {shard.file: _stamp(folder / shard.file) for shard in Manifest.load(folder, name).shards}
        except DatastoreError:
            continue
    return {}


def _stamp(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def contents(folder: Path) -> dict[str, str]:
    """Checksum of each file of a store, by name, without times of building."""
    found = {}
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        if path.name.startswith(INDEX.name) and path.suffix == ".json":
            content = re.sub(rb'"seconds": \{[^}]*\}|"sha256": "\w*"', b"", content)
        if path.name not in NOT_COMPARED:
            found[path.name] = sha256(content).hexdigest()
    return found


def differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    """In words, how two stores differ."""
    differ = [name for name in expected if found.get(name) != expected[name]]
    return [f"{name} differs" for name in differ] + [f"{name} is left over" for name in found if name not in expected]


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def make_corpus(path: Path, pairs: int, seed: int = 0) -> Path:
    """Random words of different lengths, in documents of ten pairs."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzäöü", k=rng.randint(2, 8))) for _ in range(200)]
    with path.open("w", encoding="utf-8") as file:
        for number in range(pairs):
            row = {side: " ".join(rng.choices(words, k=rng.randint(1, 9))) for side in ("src", "tgt")}
            file.write(json.dumps(row | {"document": f"document {number // 10}"}) + "\n")
    return path


def make_work(root: Path, pairs: int) -> Work:
    """A tiny model and a corpus."""
    corpus = make_corpus(root / "corpus.jsonl", pairs)
    shape = ModelShape(vocabulary=300, d_model=16, encoder_layers=1, decoder_layers=1, heads=2, ffn=32, positions=64)
    with corpus.open(encoding="utf-8") as lines:
        init_model((json.loads(line)[side] for line in lines for side in ("src", "tgt")), root / "model", shape)
    return Work(root / "model", corpus)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Kill as often as asked, in all stages in turn; builds of two processes and commands likewise."""
    from crash_commands import COMMANDS, Commands

    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        crashes = Crashes(make_work(root, options.pairs), root, options.seed)
        start = time.perf_counter()
        stages = [*islice(cycle(STAGES), options.kills), *islice(cycle(TOGETHER), options.together)]
        outcomes = [crashes.kill(stage) for stage in tqdm(stages, unit=" kills")]
        commands = Commands(crashes.work, root, options.seed)
        outcomes += [commands.kill(name) for name in tqdm([*islice(cycle(COMMANDS), options.commands)], unit=" kills")]
        steps = dict(crashes.steps)
        if options.together:
            steps |= {stage: crashes.steps_together[ranks[0]] for stage, ranks in TOGETHER.items()}
    good = [outcome for outcome in outcomes if not outcome.problems]
    return {
        "ratio": len(good) / len(outcomes),
        "kills": dict(Counter(outcome.stage for outcome in outcomes)),
        "steps_of_a_whole_build": steps,
        "different_moments": len({(outcome.stage, outcome.step) for outcome in outcomes}),
        "whole_shards_kept": dict(sorted(Counter(outcome.kept for outcome in outcomes).items())),
        "problems": [vars(outcome) for outcome in outcomes if outcome.problems],
        "seconds_per_kill": round((time.perf_counter() - start) / len(outcomes), 2),
        "settings": {name: value for name, value in vars(options).items() if name not in ("json", "quick")},
        **common.environment(),
    }


def main() -> None:
    """Kill, print what came of it, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer kills")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--kills", type=int, help="750, or 12 with --quick")
    parser.add_argument("--together", type=int, help="kills of builds of two processes: 100, or 3 with --quick")
    parser.add_argument("--commands", type=int, help="kills of commands of build_index.py: 150, or none with --quick")
    parser.add_argument("--pairs", type=int, default=160, help="sentence pairs of the corpus")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.kills is None:
        options.kills = 12 if options.quick else 750
    if options.together is None:
        options.together = 3 if options.quick else 100
    if options.commands is None:
        options.commands = 0 if options.quick else 150
    common.set_threads(1)
    result = measure(options)
    print("| stage | kills | steps of a whole build |\n|---|---|---|")
    for stage, kills in result["kills"].items():
        print(f"| {stage} | {kills} | {result['steps_of_a_whole_build'].get(stage, 'at any time')} |")
    for problem in result["problems"]:
        print(problem)
    print(f"\nratio {result['ratio']}: share of the kills after which the same command made the identical store")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
