"""Changes of a store that are stopped, killed or refused: it is what it was, and the same command continues."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

import pytest
from living_stores import FACTORIES, NEW, OLD, appending, contents, found, make_built, make_grown, queries
from tiny_stores import harm_file

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building import change as changes
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.compact import compact
from lightning_knnmt.building.datastore import DatastoreConfig
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.building.verify import verify
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import PartialFile
from lightning_knnmt.storage.layout import BUILDING
from lightning_knnmt.storage.lock import only_writer


@pytest.fixture(scope="module")
def built(backbone: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of the old pairs with an index of every family; to be left as it is."""
    return make_built(backbone, tmp_path_factory.mktemp("built") / "store")


@pytest.fixture(scope="module")
def grown(backbone: KeyedModel, built: Path) -> Path:
    """A copy with the new pairs appended; to be left as it is."""
    return make_grown(backbone, built, built.parent / "grown" / "store")


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy of the store of the old pairs."""
    return shutil.copytree(built, tmp_path / "store")


class Killed(BaseException):
    """Stands for SIGKILL: nothing that the program does can catch it."""


def stopping_points(folder: Path, change: Callable[[], object], patch: pytest.MonkeyPatch) -> Iterator[str]:
    """Run a change again and again, each time stopped one file later than before, until it comes to its end."""
    finish, files = PartialFile.finish, [0]
    stop = 0
    while True:
        files[0] = 0

        def count(self: PartialFile, stop: int = stop) -> None:
            files[0] += 1
            if files[0] > stop:
                raise Killed(self.path.name)
            finish(self)

        with patch.context() as patched:
            patched.setattr(PartialFile, "finish", count)
            try:
                change()
            except Killed as killed:
                yield str(killed)
            else:
                return
        stop += 1


@pytest.mark.parametrize("action", ["append", "compact"])
def test_a_change_that_is_stopped_has_changed_nothing_and_can_be_repeated(
    backbone: KeyedModel, folder: Path, grown: Path, monkeypatch: pytest.MonkeyPatch, action: str
) -> None:
    if action == "compact":
        shutil.rmtree(folder)
        shutil.copytree(grown, folder)
        remove_documents(folder, ["page-2"])
    config, names = appending(folder), ("fast", "parts")
    for path in (path for name in {*FACTORIES} - {*names} for path in list(folder.glob(f"{name}.*"))):
        path.unlink()
    before = Manifest.load(folder)
    stopped = []

    def change() -> None:
        append_pairs(backbone, config) if action == "append" else compact(folder)

    with Datastore(folder) as store:
        asked = queries(store)
        expected = {name: found(store, name, asked, 3) for name in names}
    for file in stopping_points(folder, change, monkeypatch):
        stopped.append(file)
        assert Manifest.load(folder) == before
        assert verify(folder) == []
        with Datastore(folder) as store:
            assert {name: found(store, name, asked, 3) for name in expected} == expected
    assert len(stopped) > 5
    after = Manifest.load(folder)
    assert after.generation == before.generation + 1
    assert verify(folder) == []
    with Datastore(folder) as store:
        rest = [pair for pair in [*OLD, *NEW] if action == "append" or pair.document != "page-2"]
        assert sorted(store.sources()) == sorted(pair.src for pair in rest)
        for name in names:
            assert len(open_index(store, name)) == len(store)
    stem = f".{after.generation}."
    indexes = [path.name for path in folder.glob("*.faiss")] + [f"{name}{stem}json" for name in names]
    assert len(indexes) == sum(stem in name for name in indexes)
    assert {"manifest.json", "writer.lock", "corpus.jsonl", *(shard.file for shard in after.shards), *indexes} == {
        path.name for path in folder.iterdir()
    }


def test_what_a_process_killed_after_its_change_left_is_cleared_away_by_the_same_command(
    backbone: KeyedModel, folder: Path, grown: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(changes, "keep_only", kill)
        with pytest.raises(Killed):
            append_pairs(backbone, appending(folder))
    assert verify(folder) == []
    assert (folder / "flat.faiss").exists()
    with Datastore(folder) as store:
        assert len(open_index(store, "flat")) == len(store)
    assert append_pairs(backbone, appending(folder)).pairs == 0
    assert set(contents(folder)) == set(contents(grown))


def append_until_killed(model: str, config: DatastoreConfig, steps: int) -> None:
    finish = PartialFile.finish

    def kill(self: PartialFile) -> None:
        nonlocal steps
        if (steps := steps - 1) < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        finish(self)

    PartialFile.finish = kill  # type: ignore[method-assign]
    append_pairs(load_model(model, device="cpu"), config)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_an_append_that_is_killed_continues_after_its_last_whole_shard(backbone: KeyedModel, folder: Path) -> None:
    config = replace(appending(folder), shard_pairs=2)
    before = Manifest.load(folder)
    process = get_context("spawn").Process(target=append_until_killed, args=(backbone.name, config, 6))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert Manifest.load(folder) == before and verify(folder) == []
    begun = Manifest.load(folder, BUILDING).shards
    assert len(begun) > len(before.shards)
    written = {shard.file: (folder / shard.file).stat().st_mtime_ns for shard in begun}
    append_pairs(backbone, config)
    assert verify(folder) == []
    assert {name: (folder / name).stat().st_mtime_ns for name in written} == written
    with Datastore(folder) as store:
        assert sorted(store.sources()) == sorted(pair.src for pair in [*OLD, *NEW])


def test_another_corpus_than_the_one_that_was_stopped_begins_anew(
    backbone: KeyedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    points = stopping_points(folder, lambda: append_pairs(backbone, appending(folder)), monkeypatch)
    while not next(points).startswith("fast"):  # some indexes have been extended
        pass
    points.close()
    append_pairs(backbone, appending(folder, NEW[5:9]))
    assert verify(folder) == []
    with Datastore(folder) as store:
        assert sorted(store.sources()) == sorted(pair.src for pair in [*OLD, *NEW[5:9]])
        assert all(len(open_index(store, name)) == len(store) for name in FACTORIES)


def test_what_does_not_fit_is_refused_and_changes_nothing(backbone: KeyedModel, folder: Path, tmp_path: Path) -> None:
    other = load_model(backbone.name, key_type="ffn_input", device="cpu")
    none = tmp_path / "none"
    before = contents(folder)
    with pytest.raises(DatastoreError, match=r"does not fit the model .*key_type decoder_output against ffn_input"):
        append_pairs(other, appending(folder))
    for change in (lambda: compact(none), lambda: remove_documents(none, ["a"])):
        with pytest.raises(DatastoreError, match=r"none holds no datastore"):
            change()
    assert not none.exists()
    with pytest.raises(DatastoreError, match=r"has no document 'page1': did you mean 'page-"):
        remove_documents(folder, ["page-0", "page1"])
    with pytest.raises(DatastoreError, match=r"has no document 'xyz': it has 3 documents"):
        remove_documents(folder, ["xyz"])
    with pytest.raises(DatastoreError, match=r"document is ''"):
        remove_documents(folder, [""])
    with only_writer(folder):
        for change in (
            lambda: compact(folder), lambda: remove_documents(folder, ["page-0"]),
            lambda: append_pairs(backbone, appending(folder)),
        ):  # fmt: skip
            with pytest.raises(DatastoreError, match="is being written to by process"):
                change()
    assert contents(folder) == before
    remove_documents(folder, ["page-0"])
    shard = folder / "shard-00001.h5"
    harm_file(shard, "changed")
    with pytest.raises(DatastoreError, match=r"shard-00001.h5 is damaged .its checksum is another.; restore it first"):
        compact(folder)
    shard.write_bytes(before[shard.name])
    harm_file(folder / "ivf.faiss", "changed")
    for change in (lambda: append_pairs(backbone, appending(folder)), lambda: compact(folder)):
        with pytest.raises(DatastoreError, match=r"ivf.faiss is missing or damaged; build the index again"):
            change()
