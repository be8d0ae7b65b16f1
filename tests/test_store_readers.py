"""Readers that open and search a datastore while others change it."""

import shutil
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_stores import build_store, corpus_pairs, harm_file, write_corpus

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building import verify as datastore_verify
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.compact import compact
from lightning_knnmt.building.datastore import DatastoreConfig
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Manifest
from lightning_knnmt.datastore import store as datastore_store
from lightning_knnmt.index import opening
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.memory import DatastoreMemory, open_memory
from lightning_knnmt.storage import snapshot
from lightning_knnmt.storage.errors import DatastoreError

PAIRS = corpus_pairs(12)
ROUNDS = 4
NAMES = ("flat", "parts")


@pytest.fixture(scope="module")
def built(backbone: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards with two indexes, one of them in parts; to be left as it is."""
    folder = tmp_path_factory.mktemp("built") / "store"
    with build_store(backbone, folder, PAIRS, shard_pairs=1) as store:
        build_index(store, IndexConfig("Flat", name="flat"))
        build_index(store, IndexConfig("IVF2,SQ8", name="parts", layout="shards", part_entries=20))
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    return shutil.copytree(built, tmp_path / "store")


def append(backbone: KeyedModel, folder: Path, number: int = 0) -> None:
    corpus = write_corpus(folder.parent / "new.jsonl", [Pair(f"neu {number}", "new file", f"new-{number}")])
    append_pairs(backbone, DatastoreConfig(folder, corpus, max_tokens=100, shard_pairs=1))


def assert_consistent(memory: DatastoreMemory, rescore: int) -> None:
    """What is found has the distances that the stored keys have."""
    store = memory.datastore
    queries = store.sample_keys(3)
    found = memory.search(torch.from_numpy(queries), k=2, nprobe=2, rescore=rescore)
    keys = np.concatenate(list(store.key_chunks())).astype(np.float32)
    exact = ((keys[found.ids.numpy()] - queries[:, None]) ** 2).sum(2)
    np.testing.assert_allclose(found.distances.numpy(), exact, atol=1e-2)
    assert not store.removed.covers(found.ids.numpy()).any()


def open_again_and_again(model: str, folder: Path, pipe: Connection) -> None:
    """Open and search until told to stop, and tell how many states of the store were seen, and the first error."""
    torch.set_num_threads(1)
    backbone, seen = load_model(model, device="cpu"), set[str]()
    pipe.send("ready")
    try:
        while not pipe.poll():
            for name in NAMES:
                with open_memory(folder, name) as memory:
                    memory.check(backbone)
                    assert_consistent(memory, rescore=4)
                    seen.add(memory.datastore.fingerprint)
            if problems := verify(folder):
                raise DatastoreError(str(problems[0]))
    except Exception as error:
        pipe.send((f"{type(error).__name__}: {error}", len(seen)))
    else:
        pipe.send((None, len(seen)))


def test_a_process_that_opens_a_store_all_the_time_sees_no_change_half_done(backbone: KeyedModel, folder: Path) -> None:
    ours, theirs = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=open_again_and_again, args=(backbone.name, folder, theirs))
    process.start()
    assert ours.recv() == "ready"
    for number in range(ROUNDS):
        append(backbone, folder, number)
        remove_documents(folder, [f"new-{number}"])
        compact(folder)
    ours.send("stop")
    error, states = ours.recv()
    process.join()
    assert error is None
    assert states > 3


def during(patch: pytest.MonkeyPatch, module: Any, name: str, change: Callable[[], object], calls: int = 1) -> None:
    """Let a change happen just before one of the calls of a function."""
    function, left = getattr(module, name), [calls]

    def changing(*args: Any, **options: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            change()
        return function(*args, **options)

    patch.setattr(module, name, changing)


MOMENTS = {
    "the list of removed entries": (datastore_store.Removed, "load", 1),
    "a shard": (datastore_store, "open_shard", 2),
    "the manifest again": (datastore_store, "read_manifest", 2),
    "the description": (opening.IndexReport, "load", 1),
    "the index": (opening, "_load", 1),
    "the description again": (opening.IndexReport, "load", 2),
}


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("action", ["append", "remove", "compact"])
def test_a_change_at_any_moment_of_opening_is_seen_whole_or_not_at_all(
    backbone: KeyedModel, folder: Path, monkeypatch: pytest.MonkeyPatch, moment: str, action: str
) -> None:
    remove_documents(folder, ["page-1"])
    changes = {
        "append": lambda: append(backbone, folder),
        "remove": lambda: remove_documents(folder, ["page-2"]),
        "compact": lambda: compact(folder),
    }
    before = Manifest.load(folder)
    module, name, calls = MOMENTS[moment]
    for index in NAMES:
        with monkeypatch.context() as patch:
            during(patch, module, name, changes[action], calls)
            with open_memory(folder, index) as memory:
                memory.check(backbone)
                assert_consistent(memory, rescore=4)
                after = Manifest.load(folder)
                assert memory.datastore.manifest in (before, after)
                assert before != after or index != NAMES[0]  # the change has happened, but not twice


def test_a_store_that_is_read_through_while_it_changes_is_not_called_damaged(
    backbone: KeyedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        during(patch, datastore_verify, "file_sha256", lambda: append(backbone, folder))
        assert verify(folder) == []
    harm_file(folder / "flat.1.faiss", "changed")
    with monkeypatch.context() as patch:
        during(patch, datastore_verify, "file_sha256", lambda: remove_documents(folder, ["page-1"]))
        assert [problem.file for problem in verify(folder)] == ["flat.1.faiss"]


@pytest.mark.parametrize(("changes", "tries"), [(False, 1), (True, snapshot.TRIES)])
def test_what_is_missing_is_an_error_at_once_and_what_changes_forever_in_the_end(
    tmp_path: Path, changes: bool, tries: int
) -> None:
    tried = []

    def attempt() -> None:
        tried.append(None)
        if changes:
            (tmp_path / "manifest.json").write_text(str(len(tried)))
        raise DatastoreError("it is gone")

    with pytest.raises(DatastoreError, match="it is gone"):
        snapshot.open_together(tmp_path, attempt)
    assert len(tried) == tries
