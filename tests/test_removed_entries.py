"""Numbers of removed entries: what they cover, and which files are refused."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_stores import harm_file, numbered_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.verify import verify
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.sealed import read_sealed, write_sealed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A store of 30 entries."""
    with numbered_store(tmp_path / "store", [20, 10]) as store:
        return store.folder


def edit_manifest(folder: Path, **fields: Any) -> None:
    write_sealed(folder / "manifest.json", {**read_sealed(folder / "manifest.json"), **fields})


def remove(folder: Path, starts: Any, stops: Any, entries: int = 3) -> None:
    """Say that some entries were removed, whatever they are."""
    path = folder / "removed-1.json"
    write_sealed(path, {"starts": starts, "stops": stops})
    edit_manifest(folder, removed={"file": path.name, "entries": entries, "sha256": file_sha256(path)})


def test_ranges_cover_what_a_set_of_numbers_does() -> None:
    rng = np.random.default_rng(0)
    starts = rng.choice(100, 40, replace=False) * 5
    stops = starts + rng.integers(1, 6, 40)
    removed = Removed.of(starts, stops)
    numbers = {number for start, stop in zip(starts, stops, strict=True) for number in range(start, stop)}
    assert len(removed) == len(numbers)
    assert len(removed.starts) < 40  # of which some follow each other
    assert (removed.starts[1:] > removed.stops[:-1]).all()
    asked = rng.integers(-1, 520, (30, 7))
    assert removed.covers(asked).tolist() == [[number in numbers for number in row] for row in asked.tolist()]
    assert not Removed.none().covers(asked).any()


def test_a_search_leaves_out_exactly_the_removed_entries(folder: Path) -> None:
    with Datastore(folder) as store:
        build_index(store, IndexConfig("Flat"))
    remove(folder, [0, 18, 29], [5, 23, 30], entries=11)
    with Datastore(folder) as store:
        queries = np.array([[0, number] for number in range(30)], np.float32)
        distances, ids = open_index(store).search(queries, 4)
        left = [*range(5, 18), *range(23, 29)]
        for number, near, found in zip(range(30), distances, ids, strict=True):
            expected = sorted((number - other) ** 2 for other in left)[:4]
            assert near.tolist() == expected == [(number - other) ** 2 for other in found.tolist()]
        everything = open_index(store).search(queries, 25)[1]
        assert (everything[:, 19:] == -1).all()
        assert [sorted(row) for row in everything[:, :19].tolist()] == [left] * 30
        assert list(store.sources()) == [f"source {entry}" for entry in left]
        assert len(store.values) == len(store) == 30


@pytest.mark.parametrize(
    ("starts", "stops"),
    [
        ([-1], [3]), ([0], [10**6]), ([0], [2**63]), ([5], [5]), ([7], [5]), ([0, 3], [4, 6]), ([0], [3, 4]),
        ([0, -(2**63)], [5, -1]), ([0.5], [3.5]), (["0"], ["3"]), ([[0]], [[3]]), ([], []), (3, 4), ([0], [4]),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(folder: Path, starts: Any, stops: Any) -> None:
    remove(folder, starts, stops)
    with pytest.raises(DatastoreError, match=r"removed-1.json is damaged"):
        Datastore(folder)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("removed", {"file": "../x.json", "entries": 1, "sha256": ""}, r"names the file '../x.json' of removed"),
        ("removed", {"file": "removed-1.json", "entries": True, "sha256": ""}, "entries is 'True'"),
        ("removed", {"file": "removed-9.json", "entries": 1, "sha256": ""}, r"removed-9.json is missing"),
        ("removed", [1], "is damaged"),
        ("generation", -1, "generation is -1, expected 0"),
        ("generation", "../x", r"generation is '../x', expected int"),
        ("appended", [3], "is damaged"),
    ],
)
def test_a_hostile_manifest_is_refused(folder: Path, name: str, value: Any, message: str) -> None:
    edit_manifest(folder, **{name: value})
    with pytest.raises(DatastoreError, match=message):
        Datastore(folder)


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed", "link"])
def test_a_damaged_file_of_numbers_is_found(folder: Path, tmp_path: Path, harm: str) -> None:
    remove(folder, [0], [3])
    assert verify(folder) == []
    path = folder / "removed-1.json"
    if harm == "link":
        path.rename(tmp_path / "outside.json")
        path.symlink_to(tmp_path / "outside.json")
    else:
        harm_file(path, harm)
    assert [problem.file for problem in verify(folder)] == ["removed-1.json"]
    with pytest.raises(DatastoreError, match=r"removed-1.json is (missing|damaged|a link)"):
        Datastore(folder)


def test_indexes_of_a_store_made_before_removing_was_possible_still_belong_to_it(folder: Path) -> None:
    manifest = read_sealed(folder / "manifest.json")
    assert not {"generation", "appended", "removed"} & set(manifest)
    del manifest["encoding"]  # nor do all fields of today
    write_sealed(folder / "manifest.json", manifest)
    assert Datastore(folder).fingerprint == file_sha256(folder / "manifest.json")
    with Datastore(folder) as store:
        build_index(store, IndexConfig("Flat"))
    remove(folder, [0], [3])
    with Datastore(folder) as store:
        open_index(store)
