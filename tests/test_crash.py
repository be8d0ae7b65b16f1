"""Processes that really die while they build: what they leave opens only if it is whole, and the next run continues."""

import os
import re
import signal
import socket
import sys
import time
from argparse import Namespace
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from lightning_knnmt.datastore import Manifest
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import BUILDING
from lightning_knnmt.storage.lock import only_writer

resource = pytest.importorskip("resource")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import crash  # noqa: E402

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")


@pytest.fixture(scope="module")
def crashes(tmp_path_factory: pytest.TempPathFactory) -> crash.Crashes:
    """A tiny store that was built in peace, and the means to kill others."""
    root = tmp_path_factory.mktemp("crash")
    return crash.Crashes(crash.make_work(root, pairs=80), root, seed=2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.mark.parametrize("stage", [*crash.STAGES, "write"])
def test_a_build_that_is_killed_and_run_again_is_one_that_was_never_killed(crashes: crash.Crashes, stage: str) -> None:
    outcome = crashes.kill(stage)
    assert outcome.problems == []
    if stage in ("train", "add"):
        assert outcome.kept == len(Manifest.load(crashes.whole).shards) > 3


def build_and_tell(work: crash.Work, folder: Path, largest: int, tell: Connection) -> None:
    """Build where no file can grow beyond some bytes, as on a full disk, and tell the error."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
    try:
        work.build(folder)
    except DatastoreError as error:
        tell.send(str(error))


@pytest.mark.parametrize(
    ("largest", "message"),
    [
        (0, r"store cannot be written to \(File too large\); make room"),
        (100, r"building.json could not be written \(File too large\).*run the same command again"),
        (3000, r"shard-00000.h5 could not be written \(File too large\).*run the same command again"),
        ("shard-*", r"shard-0000\d.h5 could not be written \(File too large\).*run the same command again"),
        ("index.faiss", r"index.faiss could not be written \(File too large\).*run the same command again"),
    ],
)
def test_a_full_disk_is_an_error_that_names_the_file_and_the_next_run_continues(
    crashes: crash.Crashes, folder: Path, largest: int | str, message: str
) -> None:
    if isinstance(largest, str):  # the last bytes are missing
        largest = max(path.stat().st_size for path in crashes.whole.glob(largest)) - 10
    process, told = crashes.start(build_and_tell, crashes.work, folder, largest)
    process.join()
    assert process.exitcode == 0  # HDF5 by itself would have crashed
    assert re.search(message, told.recv())
    assert not list(folder.glob("*.partial"))
    assert crashes.run_again(folder) == []


def hold(folder: Path, tell: Connection) -> None:
    """Write to a store until killed."""
    with only_writer(folder):
        tell.send(os.getpid())
        time.sleep(60)


def test_a_second_writer_is_refused_until_the_first_is_gone_even_if_it_was_killed(
    crashes: crash.Crashes, folder: Path
) -> None:
    process, told = crashes.start(hold, folder)
    holder = f"process {told.recv()} on {socket.gethostname()}"
    with (
        pytest.raises(DatastoreError, match=f"is being written to by {holder}; wait until it has"),
        only_writer(folder),
    ):
        pass
    _, said = crashes.start(build_and_tell, crashes.work, folder, 10**6)
    assert f"store is being written to by {holder}; wait until" in said.recv()
    process.kill()
    process.join()
    with only_writer(folder), pytest.raises(DatastoreError, match="is being written to by process"):  # noqa: SIM117
        with only_writer(folder):
            pass
    with only_writer(folder):
        pass


@pytest.mark.parametrize("harmed", [["shard-00001.h5"], ["shard-00000.h5", "shard-00002.h5"], [BUILDING]])
@pytest.mark.parametrize("size", ["nothing", "half", "zeros"])
def test_files_that_a_power_loss_cut_short_are_made_again(
    crashes: crash.Crashes, folder: Path, harmed: list[str], size: str
) -> None:
    process, told = crashes.start(crashes.work.build, folder)
    while not (folder / "shard-00003.h5").exists():
        told.recv()
    process.kill()
    process.join()
    for name in harmed:
        content = (folder / name).read_bytes()
        half = content[: len(content) // 2]
        left = {"nothing": b"", "half": half, "zeros": half + bytes(len(content) - len(half))}[size]
        (folder / name).write_bytes(left)
    assert crashes.run_again(folder) == []


@pytest.mark.parametrize("name", ["index.trained.faiss", "index.trained.json", "index.faiss", "index.json"])
def test_an_index_that_is_not_whole_is_built_again(crashes: crash.Crashes, folder: Path, name: str) -> None:
    process, told = crashes.start(crashes.work.build, folder)
    with suppress(EOFError):  # the last file is there when the process has ended
        while not (folder / name).exists():
            told.recv()
    process.kill()
    process.join()
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    assert crashes.run_again(folder) == []


def test_training_that_was_finished_is_not_repeated(
    crashes: crash.Crashes, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process, told = crashes.start(crashes.work.build, folder)
    while told.recv() != "add":
        pass
    process.kill()
    process.join()
    monkeypatch.setattr(crash.index_builder, "train", None)  # training again would fail
    with crash.Datastore(folder) as store:
        report = crash.build_index(store, crash.INDEX)
    assert set(report.seconds) == {"sample", "train", "add", "merge", "write"}
    assert crash.differences(crash.contents(folder), crashes.expected) == []


def test_the_benchmark_gives_the_share_of_identical_stores_beside_its_settings() -> None:
    result = crash.measure(Namespace(kills=2, together=1, commands=1, pairs=60, seed=3, quick=True, json=None))
    assert (result["ratio"], result["problems"]) == (1.0, [])
    assert result["kills"] == {"encode": 1, "train": 1, "rank 0 of 2": 1, "build command": 1}
    assert result["settings"] == {"kills": 2, "together": 1, "commands": 1, "pairs": 60, "seed": 3}


def test_the_comparison_sees_what_differs(crashes: crash.Crashes) -> None:
    other = crashes.expected | {"index.faiss": "0", "index.trained.faiss": "0"}
    del other["manifest.json"]
    assert crash.differences(other, crashes.expected) == [
        "index.faiss differs", "manifest.json differs", "index.trained.faiss is left over"
    ]  # fmt: skip
