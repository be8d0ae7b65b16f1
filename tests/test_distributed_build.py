"""Two processes that build together write, byte by byte, what one writes, whatever happens to them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from script_runs import write_config
from tqdm import tqdm

import build_index
from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.datastore import Manifest
from lightning_knnmt.storage import ranks
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import BUILDING
from lightning_knnmt.storage.lock import only_writer
from lightning_knnmt.storage.ranks import Processes, Ranks

pytest.importorskip("resource")
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))
import crash  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
SIZE, BATCH = 2, "batch"


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> crash.Crashes:
    """A tiny store that one process built, and the means to start others."""
    root = tmp_path_factory.mktemp("crash")
    return crash.Crashes(crash.make_work(root, pairs=90), root)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


def config_of(work: crash.Work, folder: Path, corpus: Path | None = None) -> DatastoreConfig:
    return DatastoreConfig(folder, CorpusFile(corpus or work.corpus), 200, shard_pairs=work.shard_pairs)


def build_as(rank: int, port: int, model: Path, builds: list[tuple[DatastoreConfig, str]], tell: Connection) -> None:
    """Be one rank of some builds, as if Lightning or a cluster had started it, and tell the end or error of each."""
    crash.common.set_threads(1)
    os.environ.update(LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    backbone = load_model(str(model), device="cpu")
    with Processes(devices=SIZE).start(backbone) as ranks:
        for config, harm in builds:
            encoded: list[int] = []

            def keys(batch: Batch, harm: str = harm, encoded: list[int] = encoded) -> torch.Tensor:
                encoded.append(len(batch))
                tell.send(BATCH)
                if harm == "slow":
                    time.sleep(0.01)
                found = type(backbone).keys(backbone, batch)
                return found * torch.nan if harm == "nan" and rank == 1 else found

            backbone.keys = keys  # type: ignore[method-assign]
            try:
                manifest = build_datastore(backbone, config, ranks).manifest
            except DatastoreError as error:
                tell.send(str(error))
            else:
                tell.send(f"{sum(encoded)} of {manifest.pairs} pairs")


def start(crashes: crash.Crashes, *builds: tuple[DatastoreConfig, str]) -> list[tuple[Any, Connection]]:
    """Start both ranks of some builds."""
    port = crash.free_port()
    return [crashes.start(build_as, rank, port, crashes.work.model, list(builds)) for rank in range(SIZE)]


def ends(started: list[tuple[Any, Connection]]) -> list[tuple[str, ...]]:
    """What the ranks say of each build: [build -> what each rank says]."""
    told = [[message for message in crash._told(pipe) if message != BATCH] for _, pipe in started]
    for process, _ in started:
        process.join()
        assert process.exitcode == 0
    return list(zip(*told, strict=True))


def store_of(folder: Path) -> dict[str, str]:
    return {name: sha for name, sha in crash.contents(folder).items() if not name.startswith("index")}


def shares(told: tuple[str, ...]) -> list[int]:
    """Pairs that each rank has encoded."""
    return [int(message.split()[0]) for message in told]


@pytest.mark.slow
def test_two_processes_write_the_store_of_one_and_keep_it_and_have_all_errors_in_common(
    crashes: crash.Crashes, folder: Path
) -> None:
    other = folder.with_name("other.jsonl")
    other.write_text(json.dumps({"src": "eins", "tgt": "one"}) + "\n")
    config = config_of(crashes.work, folder)
    unfinished = config_of(crashes.work, folder.with_name("nan"))
    told = ends(
        start(
            crashes,
            (config, "none"), (config, "none"), (config_of(crashes.work, folder, other), "none"),
            (unfinished, "nan"), (unfinished, "none"),
        )
    )  # fmt: skip
    pairs = [shard.pairs for shard in Manifest.load(crashes.whole).shards]
    assert len(pairs) > 4
    assert shares(told[0]) == [sum(pairs[0::2]), sum(pairs[1::2])] == shares(told[4])
    assert shares(told[1]) == [0, 0]
    for messages, message in ((told[2], "already holds another datastore: corpus"), (told[3], "is NaN or beyond fp16")):
        assert messages[0] == messages[1]
        assert message in messages[0]
    assert store_of(folder) == store_of(unfinished.folder) == store_of(crashes.whole)


@pytest.mark.slow
@pytest.mark.parametrize("killed", range(SIZE))
def test_a_killed_rank_leaves_whole_shards_from_which_one_or_two_processes_continue(
    crashes: crash.Crashes, folder: Path, killed: int
) -> None:
    config = config_of(crashes.work, folder)
    started = start(crashes, (config, "slow"))
    while not (folder / BUILDING).exists() or len(Manifest.load(folder, BUILDING).shards) < SIZE:
        started[1 - killed][1].recv()
    started[killed][0].kill()
    assert "another process of this build has ended" in crash._told(started[1 - killed][1])[-1]
    for process, _ in started:
        process.join()
    begun = Manifest.load(folder, BUILDING)
    stamps = {shard.file: crash._stamp(folder / shard.file) for shard in begun.shards}
    assert 2 <= len(stamps) < len(Manifest.load(crashes.whole).shards)
    if killed:
        assert crashes.run_again(folder) == []
    else:
        assert (
            sum(shares(ends(start(crashes, (config, "none")))[0])) == Manifest.load(crashes.whole).pairs - begun.pairs
        )
    assert store_of(folder) == store_of(crashes.whole)
    assert {name: crash._stamp(folder / name) for name in stamps} == stamps


def script_config(crashes: crash.Crashes, folder: Path) -> Path:
    """Configuration of the build that `crashes` has made in one process."""
    options = {
        "backbone": {"model": crashes.work.model, "device": "cpu"},
        "datastore": {
            "folder": folder, "corpus": {"path": crashes.work.corpus}, "max_tokens": 200,
            "shard_pairs": crashes.work.shard_pairs,
        },
        "index": {
            "factory": crash.INDEX.factory, "chunk": crash.INDEX.chunk, "part_entries": crash.INDEX.part_entries
        },
        "processes": {"devices": SIZE},
    }  # fmt: skip
    return write_config(folder.with_name("build.yaml"), options)


def script_store(folder: Path) -> dict[str, str]:
    """Checksums of what the script has built, without its record of times."""
    found = crash.contents(folder)
    found.pop("build.json")
    return found


@pytest.mark.slow
def test_the_script_starts_the_other_process_and_builds_the_index(crashes: crash.Crashes, folder: Path) -> None:
    command = [sys.executable, str(ROOT / "build_index.py"), "--config", str(script_config(crashes, folder))]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert script_store(folder) == crashes.expected
    record = json.loads((folder / "build.json").read_text())
    assert record["encode"]["entries"] == Manifest.load(folder).entries
    assert record["indexes"]["index"]["seconds"]
    assert done.stderr.count("imbalance factor") == 1


def variables_of(launcher: str, rank: int, port: int) -> dict[str, str]:
    """What a launcher of two processes on one machine puts into the environment of each."""
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    if launcher == "torchrun":
        numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": SIZE, "LOCAL_WORLD_SIZE": SIZE, "GROUP_RANK": 0}
        return {"TORCHELASTIC_RUN_ID": "none", **common, **{name: str(number) for name, number in numbers.items()}}
    numbers = {
        "JOB_ID": 4711, "STEP_ID": 0, "NTASKS": SIZE, "STEP_NUM_TASKS": SIZE, "NTASKS_PER_NODE": SIZE, "NNODES": 1,
        "PROCID": rank, "LOCALID": rank, "NODEID": 0,
    }  # fmt: skip
    texts = {"JOB_NAME": "build", "JOB_NODELIST": "node1", "NODELIST": "node1"}
    return common | {f"SLURM_{name}": str(value) for name, value in (numbers | texts).items()}


def be_launched(variables: dict[str, str], log: Path, arguments: list[str], patience: float, tell: Connection) -> None:
    """Be a process that a launcher has started; nothing that a build does is quick here."""
    os.environ.update(variables)
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
    crash.common.set_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared among processes, and would outlive a killed one
    crash._draw_out(lambda _: None)
    ranks.START_TIMEOUT = timedelta(seconds=patience)
    build_index.main(arguments)


def launch(
    crashes: crash.Crashes, folder: Path, launcher: str, tasks: Sequence[int] = range(SIZE), patience: float = 60
) -> list[Any]:
    """Launch some of the two processes."""
    port, arguments = crash.free_port(), ["build", "--config", str(script_config(crashes, folder))]
    started = []
    for rank in tasks:
        log = folder.with_name(f"log-{rank}")
        log.unlink(missing_ok=True)
        started.append(crashes.start(be_launched, variables_of(launcher, rank, port), log, arguments, patience)[0])
    return started


def exit_codes(processes: list[Any]) -> list[int]:
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_launched_processes_build_the_store_of_one_after_others_of_them_died(
    crashes: crash.Crashes, folder: Path, launcher: str
) -> None:
    if launcher == "srun":
        for task in range(SIZE):  # its fellow never comes
            assert exit_codes(launch(crashes, folder, launcher, [task], patience=1)) == [2]
            log = folder.with_name(f"log-{task}").read_text()
            assert "error: the 2 processes of this build could not all be started: " in log and "Traceback" not in log
            assert not folder.exists()
    started = launch(crashes, folder, launcher)
    while not (folder / BUILDING).exists() or len(Manifest.load(folder, BUILDING).shards) < SIZE:
        time.sleep(0.01)
    started[1].kill()
    assert exit_codes(started) == [2, -signal.SIGKILL]
    assert "error: another process of this build has ended" in folder.with_name("log-0").read_text()
    begun = Manifest.load(folder, BUILDING)
    stamps = {shard.file: crash._stamp(folder / shard.file) for shard in begun.shards}
    assert 2 <= len(stamps) < len(Manifest.load(crashes.whole).shards)
    assert exit_codes(launch(crashes, folder, launcher)) == [0, 0]
    assert script_store(folder) == crashes.expected
    assert {name: crash._stamp(folder / name) for name in stamps} == stamps


@pytest.mark.parametrize("launcher", ["srun", "torchrun"])
def test_what_one_process_does_is_refused_in_several(
    marian_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    launcher: str,
) -> None:  # fmt: skip
    for name, value in variables_of(launcher, 0, 1).items():
        monkeypatch.setenv(name, value)
    folder = f"--folder={tmp_path}"
    model = [f"--backbone.model={marian_folder}", "--backbone.device=cpu"]
    for arguments in (
        ["append", *model, f"--datastore.folder={tmp_path}", "--datastore.corpus.path=a.tsv"],
        ["remove", folder, "--document=a"], ["compact", folder],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as exit:
            build_index.main(arguments)
        assert exit.value.code == 2
        expected = (
            f"error: {launcher} started 2 processes, but {arguments[0]} runs in one; start one, without {launcher}"
        )
        assert expected in capsys.readouterr().err
    monkeypatch.setenv("SLURM_JOB_NAME", "interactive")
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert ranks.started_processes() == (None, 1)


def test_no_build_begins_before_the_last_rank_of_another_has_left(folder: Path) -> None:
    class Fellow(Ranks):
        """A rank whose fellows do nothing, and cannot fail."""

        def each(self, make: Callable[[], Any]) -> list[Any]:
            return [make()]

    with only_writer(folder, Fellow(0, 2)) as _, only_writer(folder, Fellow(1, 2)):
        pass
    with ExitStack() as other:
        with only_writer(folder, Fellow(0, 2)):
            other.enter_context(only_writer(folder, Fellow(1, 2)))
            with pytest.raises(DatastoreError, match="is being written to by process"), only_writer(folder):
                pass
        with pytest.raises(DatastoreError, match="is being written to by another process"), only_writer(folder):
            pass
    with only_writer(folder):
        pass


@pytest.mark.slow
def test_the_benchmark_gives_its_ratios_beside_all_settings(crashes: crash.Crashes, tmp_path: Path) -> None:
    script, out = ROOT / "benchmarks" / "build.py", tmp_path / "out.json"
    sizes = {"pairs": 30, "repeats": 1, "processes": 2, "max_tokens": 300}
    options = [f"--{name.replace('_', '-')}={value}" for name, value in sizes.items()]
    command = [sys.executable, str(script), "--quick", f"--json={out}", f"--model={crashes.work.model}", *options]
    printed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    result = json.loads(out.read_text())
    assert result["settings"].items() >= sizes.items()
    medians = result["median_ms"]
    assert {"read", "tokenize", "pad", "write"} < set(medians)
    assert result["ratio"] == pytest.approx(medians["build"] / medians["bare forward pass"], abs=0.01)
    assert f"ratio {result['ratio']} " in printed
    assert result["padding"]["both"] <= 0.04 < result["padding_by_length_alone"]["both"]
    one, two = result["processes_ms"]["1"], result["processes_ms"]["2"]
    assert result["processes_speedup"] == pytest.approx(one / two, abs=0.01)


@pytest.mark.parametrize(
    ("args", "spelled"),
    [
        (["--config", "a.yaml"], ["build", "--config", "a.yaml"]),
        (["build", "--config", "a.yaml"], ["build", "--config", "a.yaml"]),
        (["verify", "--folder", "b"], ["verify", "b"]),
        (["compact", "--folder=b"], ["compact", "b"]),
        (
            ["remove", "--folder", "b", "--document", "c", "--document=d"],
            ["remove", "b", "--document+", "c", "--document+=d"],
        ),
        (["--help"], ["--help"]),
        ([], []),
    ],
)
def test_commands_may_be_spelled_as_in_earlier_versions(args: list[str], spelled: list[str]) -> None:
    assert build_index.spell_out(args) == spelled


def test_commands_get_their_folder_by_its_place_and_unknown_ones_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    called: list[tuple[Path, list[str] | None]] = []

    def remove(folder: Path, document: list[str] | None = None) -> None:
        called.append((folder, document))

    monkeypatch.setattr(build_index, "COMMANDS", {"build": build_index.build, "remove": remove})
    build_index.main(["remove", "b", "--document", "c", "--document", "d"])
    build_index.main(["remove", "--document=c", "--folder", "b"])
    assert called == [(Path("b"), ["c", "d"]), (Path("b"), ["c"])]
    with pytest.raises(SystemExit) as exit:
        build_index.main(["verfy"])
    assert exit.value.code == 2
    assert "invalid choice: 'verfy'" in capsys.readouterr().err


def test_wrong_numbers_of_processes_are_named(backbone: KeyedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="devices is 0, expected 1 or more"):
        Processes(devices=0)
    for name, value in variables_of("srun", 0, 1).items():
        monkeypatch.setenv(name, value)
    message = "srun started 2 processes, but devices is 1 and num_nodes 1, expected"
    with pytest.raises(ValueError, match=message), Processes().start(backbone):
        pass
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    message = "the 2 processes of this build could not all be started: You set `--ntasks=2`"
    with pytest.raises(DatastoreError, match=message), Processes(devices=2).start(backbone):
        pass
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    message = "torchrun started 4 processes, but devices is 2 and num_nodes 1, expected"
    with pytest.raises(ValueError, match=message), Processes(devices=2).start(backbone):
        pass
    assert Processes(devices=2, num_nodes=2).accelerator == "auto"
