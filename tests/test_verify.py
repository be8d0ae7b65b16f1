"""Every bit of a store and its indexes is under a checksum."""

from pathlib import Path

import numpy as np
import pytest
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.verify import verify
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.index.config import IndexConfig

FILES = (
    *("manifest.json", "shard-00000.h5", "shard-00001.h5", "index.faiss", "index.json", "other.faiss", "other.json"),
    *("split.faiss", "split.json", "split.part-00000.faiss", "split.part-00001.faiss"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "store"
    with write_store(folder, *clumpy_keys(300, 8), [200, 100]) as store:
        build_index(store, IndexConfig("IVF4,PQ4x4fs"))
        build_index(store, IndexConfig("Flat", name="other"))
        build_index(store, IndexConfig("IVF4,SQ8", name="split", layout="shards", part_entries=100))
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def test_a_store_as_it_was_written_has_no_problems(folder: Path) -> None:
    (folder / "corpus.json").write_text("{}")
    (folder / "build.json").write_text('{"indexes": {}}')
    assert verify(folder) == []


@pytest.mark.parametrize("name", FILES)
def test_a_single_flipped_bit_is_found_and_its_file_named(folder: Path, name: str) -> None:
    bits = 8 * (folder / name).stat().st_size
    for bit in {0, bits - 1, *np.random.default_rng(1).integers(0, bits, 40).tolist()}:
        flip(folder / name, bit)
        assert [problem.file for problem in verify(folder)] == [name], bit
        flip(folder / name, bit)
    assert verify(folder) == []


def test_every_bit_of_the_manifest_counts(folder: Path) -> None:
    path = folder / "manifest.json"
    for bit in range(0, 8 * path.stat().st_size, 7):
        flip(path, bit)
        assert [problem.file for problem in verify(folder)] == ["manifest.json"], bit
        flip(path, bit)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_found_and_named(folder: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    problems = verify(folder)
    (folder / name).write_bytes(content)
    assert [problem.file for problem in problems] == [name]
    assert "missing" in str(problems[0])
    assert "build" in str(problems[0])


def test_an_index_of_another_datastore_is_found(folder: Path, tmp_path: Path) -> None:
    with write_store(tmp_path / "store", *clumpy_keys(300, 8, seed=2)):
        for name in ("index.faiss", "index.json"):
            (tmp_path / "store" / name).write_bytes((folder / name).read_bytes())
    assert [str(problem) for problem in verify(tmp_path / "store")] == [
        "index.json belongs to another datastore; build the index again"
    ]


def test_only_what_the_manifest_and_descriptions_name_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of removed entries may be gone at any moment after another has taken its place."""
    Removed.of(np.array([0]), np.array([1])).save(folder, "removed-1.json")
    (folder / "notes.json").write_text("{}")
    read, read_bytes = [], Path.read_bytes

    def noted(path: Path) -> bytes:
        read.append(path.name)
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", noted)
    assert verify(folder) == []
    assert "removed-1.json" not in read
    (folder / "removed-1.json").unlink()
