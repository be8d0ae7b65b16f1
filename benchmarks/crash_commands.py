"""Commands of build_index.py that are killed and run again, as `crash.py` does with builds."""

import random
import shutil
import subprocess
import sys
import time
from functools import cached_property
from pathlib import Path

import crash
from crash import INDEX, Outcome, Work, differences, make_corpus

from lightning_knnmt.building.verify import verify
from lightning_knnmt.storage.layout import BUILD_RECORD, MANIFEST

SCRIPT = Path(__file__).resolve().parent.parent / "build_index.py"
COMMANDS = ("build", "append", "remove", "compact")
FIRST = 1 / 3  # of a command's time, before which it only imports


def contents(folder: Path) -> dict[str, str]:
    """As `crash.contents`, without the record of how long each stage took."""
    return {name: checksum for name, checksum in crash.contents(folder).items() if name != BUILD_RECORD}


class Commands:
    """Kills commands on the same store.

    Args:
        work: What `build` builds.
        root: A folder for stores.
        seed: Of the moments.
    """

    def __init__(self, work: Work, root: Path, seed: int = 1) -> None:
        self.work, self.root, self.random = work, root, random.Random(seed)
        self.more = make_corpus(root / "more.jsonl", 60, seed=1)

    def line(self, command: str, folder: Path) -> list[str]:
        """The command line."""
        build = [
            "--backbone.model", str(self.work.model), "--backbone.device", "cpu", "--datastore.folder", str(folder),
            "--datastore.max_tokens", "200", "--datastore.shard_pairs", str(self.work.shard_pairs),
            "--datastore.corpus.path", str(self.more if command == "append" else self.work.corpus),
        ]  # fmt: skip
        index = [f"--index.{name}={getattr(INDEX, name)}" for name in ("factory", "chunk", "part_entries")]
        options = {
            "build": [*build, *index],
            "append": build,
            "remove": [str(folder), "--document", "document 3"],
            "compact": [str(folder)],
        }
        return [sys.executable, str(SCRIPT), command, *options[command]]

    @cached_property
    def stages(self) -> dict[str, tuple[Path | None, dict[str, str], float]]:
        """What each command finds, what it makes of that, and its seconds, when nobody interrupts it."""
        made: dict[str, tuple[Path | None, dict[str, str], float]] = {}
        before: Path | None = None
        for command in COMMANDS:
            folder = self.root / f"after {command}"
            if before is not None:
                shutil.copytree(before, folder)
            start = time.perf_counter()
            subprocess.run(self.line(command, folder), check=True, capture_output=True)
            made[command] = (before, contents(folder), time.perf_counter() - start)
            before = folder
        return made

    def kill(self, command: str) -> Outcome:
        """Kill a command, look at what it leaves, run it again, and compare."""
        before, expected, seconds = self.stages[command]
        folder = self.root / "killed command"
        while True:
            shutil.rmtree(folder, ignore_errors=True)
            if before is not None:
                shutil.copytree(before, folder)
            moment = self.random.uniform(FIRST, 1) * seconds
            process = subprocess.Popen(self.line(command, folder), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(moment)
            except subprocess.TimeoutExpired:
                process.kill()
            if process.wait() < 0:
                break
        problems = []
        if (folder / MANIFEST).exists():
            problems += [f"after the kill: {problem}" for problem in verify(folder)]
        left = contents(folder) if folder.exists() else {}
        if differences(left, expected):
            again = subprocess.run(self.line(command, folder), capture_output=True, text=True)
            if again.returncode:
                problems.append(f"running again ended with {again.returncode}: {again.stderr[-300:]}")
        problems += differences(contents(folder), expected) + [str(problem) for problem in verify(folder)]
        shutil.rmtree(folder)
        return Outcome(f"{command} command", round(1000 * moment), 0, problems)
