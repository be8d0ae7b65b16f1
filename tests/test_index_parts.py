"""Indexes in several parts against those that are built in one."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_stores import clumpy_keys, harm_file, numbered_store, write_store

from lightning_knnmt.building import index as builder
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.verify import verify
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.opening import open_index, open_parts
from lightning_knnmt.storage.errors import DatastoreError

ENTRIES, KEY_SIZE, K = 900, 16, 10
SIZES = [200, 150, 1, 0, 249, 300]
KEYS, VALUES = clumpy_keys(ENTRIES, KEY_SIZE)
QUERIES = clumpy_keys(33, KEY_SIZE, seed=1)[0].astype(np.float32)
WITH_LISTS = [
    "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4", "IVF8,PQ4x4", "IVF8,PQ8x4fs", "IVF8,RaBitQ2", "IVF8,RaBitQfs",
    "IVF8,RaBitQfs4", "OPQ4,IVF8,PQ4x4fs", "PCA12,IVF8,SQ8", "IVF8_HNSW8,SQ8", "IVF8,PQ8x4fs,Refine(SQfp16)",
    "IVF8,PQ8x4fs,RFlat", "OPQ4,IVF8,PQ4x4fs,Refine(Flat)",
]  # fmt: skip
IN_PARTS = [
    "Flat", "SQ8", "PQ8x4fs", "RaBitQfs", "IVF8,Flat", "IVF8,SQ8", "IVF8,PQ4x4", "IVF8,PQ8x4fs", "IVF8,RaBitQ",
    "IVF8,RaBitQfs", "OPQ4,IVF8,PQ4x4fs", "PCA12,IVF8,SQ8", "IVF8_HNSW8,SQ8",
]  # fmt: skip
PRUNED = {  # searches that leave out entries after what they have found so far -> least recall
    "HNSW32": 0.95, "IVF8,RaBitQ2": 0.55, "IVF8,RaBitQfs4": 0.83, "IVF8,PQ8x4fs,Refine(SQfp16)": 0.85,
}  # fmt: skip
SHARDS = IndexConfig("IVF8,PQ8x4fs", layout="shards", part_entries=250)
PARTS = [range(350), range(350, 600), range(600, 900)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Datastore]:
    with write_store(tmp_path / "store", KEYS, VALUES, SIZES) as store:
        yield store


def search(index: FaissIndex, nprobe: int = 3) -> list[list[list[float]]]:
    return [array.tolist() for array in index.search(QUERIES, K, nprobe)]


def files(store: Datastore) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if not path.name.startswith(("shard", "writer")))


@pytest.mark.parametrize("factory", WITH_LISTS)
def test_parts_merged_into_one_are_byte_by_byte_the_index_built_in_one(store: Datastore, factory: str) -> None:
    one = build_index(store, IndexConfig(factory, name="one"))
    merged = build_index(store, IndexConfig(factory, name="merged", part_entries=250))
    assert (store.folder / "merged.faiss").read_bytes() == (store.folder / "one.faiss").read_bytes()
    assert replace(merged, seconds=one.seconds) == one
    assert set(merged.seconds) == {"sample", "train", "add", "write", "merge"}
    assert files(store) == ["manifest.json", "merged.faiss", "merged.json", "one.faiss", "one.json"]
    assert search(open_index(store, "merged")) == search(open_index(store, "one"))


@pytest.mark.parametrize("factory", ["IVF1,PQ4x4fs", "IVF1,RaBitQfs", "IVF1,PQ8x4fs,Refine(SQfp16)"])
def test_parts_are_merged_within_memory_where_a_list_has_as_many_entries_as_a_block_has_bytes(
    tmp_path: Path, factory: str
) -> None:
    # blocks have 64 or 128 bytes
    sizes = [256, 100, 156, 388]
    with write_store(tmp_path / "store", KEYS, VALUES, sizes) as store:
        build_index(store, IndexConfig(factory, name="one"))
        build_index(store, IndexConfig(factory, name="merged", part_entries=256))
        assert (store.folder / "merged.faiss").read_bytes() == (store.folder / "one.faiss").read_bytes()


@pytest.mark.parametrize("factory", IN_PARTS)
def test_an_index_kept_in_parts_finds_what_the_whole_one_finds(store: Datastore, factory: str) -> None:
    one = build_index(store, IndexConfig(factory, name="one"))
    report = build_index(store, replace(SHARDS, factory=factory))
    assert [part.entries for part in report.parts] == [len(part) for part in PARTS]
    assert report.layout == "shards"
    for figure in ("nlist", "imbalance_factor", "homogeneity", "entries"):
        assert getattr(report, figure) == getattr(one, figure)
    names = [f"index.part-0000{number}.faiss" for number in range(3)]
    assert files(store) == ["index.faiss", "index.json", *names, "manifest.json", "one.faiss", "one.json"]
    whole = open_index(store, "one")
    for mmap in (False, True):
        index = open_index(store, mmap=mmap)
        assert (len(index), index.nlist, index.key_size) == (ENTRIES, whole.nlist, KEY_SIZE)
        assert search(index)[0] == search(whole)[0]
        if "PQ" not in factory:  # whose codes are often the same for several keys
            assert search(index)[1] == search(whole)[1]
    if whole.nlist is not None:
        assert index.list_sizes().tolist() == whole.list_sizes().tolist()
        assert index.list_of_entries().tolist() == whole.list_of_entries().tolist()
        assert index.probed_lists(QUERIES, 3).tolist() == whole.probed_lists(QUERIES, 3).tolist()
        assert index.codes_scanned(QUERIES, 3).tolist() == whole.codes_scanned(QUERIES, 3).tolist()


@pytest.mark.parametrize("factory", PRUNED)
def test_parts_of_an_index_that_prunes_find_about_as_much_as_the_whole(store: Datastore, factory: str) -> None:
    build_index(store, IndexConfig(factory, name="one"))
    build_index(store, replace(SHARDS, factory=factory))
    squared = ((QUERIES[:, None].astype(np.float64) - KEYS[None].astype(np.float64)) ** 2).sum(2)
    nearest = squared.argsort(axis=1)[:, :K]
    found = {name: np.array(search(open_index(store, name), nprobe=8)[1]) for name in ("one", "index")}
    recall = {
        name: np.mean([np.isin(a, b).mean() for a, b in zip(ids, nearest, strict=True)]) for name, ids in found.items()
    }
    assert recall["index"] >= recall["one"] - 0.01
    assert recall["index"] >= PRUNED[factory]


def test_a_graph_is_built_in_one_even_if_the_store_is_large(store: Datastore) -> None:
    report = build_index(store, IndexConfig("HNSW8", part_entries=100))
    assert report.layout == "whole" and "merge" not in report.seconds
    assert files(store) == ["index.faiss", "index.json", "manifest.json"]


@pytest.mark.parametrize("layout", ["whole", "shards"])
@pytest.mark.parametrize("stopped", ["index.part-00001.faiss", "index.part-00002.faiss", "index.faiss", "index.json"])
def test_a_build_that_is_stopped_continues_after_the_last_whole_part(
    store: Datastore, monkeypatch: pytest.MonkeyPatch, layout: str, stopped: str
) -> None:
    config = replace(SHARDS, layout=layout)
    expected = build_index(store, replace(config, name="whole"))
    with monkeypatch.context() as patched:
        stop_writing(patched, stopped)
        with pytest.raises(KeyboardInterrupt):
            build_index(store, config)
    assert "index.json" not in files(store)
    assert any(name.startswith("index.part") for name in files(store))
    assert verify(store.folder)[:1] == [] or stopped == "index.json"
    with pytest.raises(DatastoreError, match="has no index called 'index'"):
        open_index(store)
    before = {path.name: path.stat().st_mtime_ns for path in store.folder.glob("index.part-*.faiss")}
    with monkeypatch.context() as patched:
        patched.setattr(builder, "train", None)  # training again would fail
        added = [len(keys) for keys in spied(patched, store, config)]
    there = {"index.part-00001.faiss": 1, "index.part-00002.faiss": 2}.get(stopped, 3)
    assert sum(added) == sum(map(len, PARTS[there:]))
    for name in files(store):
        if name.startswith("index.") and name.endswith(".faiss"):
            assert (store.folder / name).read_bytes() == (store.folder / name.replace("index", "whole", 1)).read_bytes()
        if name in before:
            assert (store.folder / name).stat().st_mtime_ns == before[name]
    assert [name for name in files(store) if name.startswith("index")] == [
        name.replace("whole", "index", 1) for name in files(store) if name.startswith("whole")
    ]
    assert replace(build_index(store, config), seconds=expected.seconds) == expected
    assert verify(store.folder) == []


def stop_writing(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Interrupt the process before it writes a file."""
    from lightning_knnmt.storage import files as files_module

    real = files_module.PartialFile.finish

    def finish(file: files_module.PartialFile) -> None:
        if file.path.name == name:
            raise KeyboardInterrupt
        real(file)

    monkeypatch.setattr(files_module.PartialFile, "finish", finish)


def spied(monkeypatch: pytest.MonkeyPatch, store: Datastore, config: IndexConfig) -> list[np.ndarray]:
    """Build, and return the keys that were read to be added."""
    read, chunks = [], Datastore.key_chunks

    def spy(stored: Datastore, chunk: int, entries: range | None = None) -> Iterator[np.ndarray]:
        for array in chunks(stored, chunk, entries):
            read.append(array)
            yield array

    monkeypatch.setattr(Datastore, "key_chunks", spy)
    build_index(store, config)
    return read


def test_parts_of_another_training_are_not_continued(store: Datastore, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        stop_writing(patched, "index.part-00002.faiss")
        with pytest.raises(KeyboardInterrupt):
            build_index(store, SHARDS)
    other = replace(SHARDS, seed=5)
    assert sum(len(keys) for keys in spied(monkeypatch, store, other)) == ENTRIES
    build_index(store, replace(other, name="whole", layout="whole"))
    assert search(open_index(store))[0] == search(open_index(store, "whole"))[0]


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_a_damaged_part_is_named_by_verify_and_built_again(store: Datastore, harm: str) -> None:
    report = build_index(store, SHARDS)
    expected = search(open_index(store))
    path = store.folder / "index.part-00001.faiss"
    harm_file(path, harm)
    (problem,) = verify(store.folder)
    assert problem.file == path.name and ("missing" if harm == "missing" else "damaged") in problem.what
    with pytest.raises(DatastoreError, match=r"index.part-00001.faiss (does not exist; build it|is damaged)"):
        open_index(store)
    again = build_index(store, SHARDS)
    assert replace(again, seconds=report.seconds) == report
    assert search(open_index(store)) == expected


def test_parts_that_changed_places_are_refused(store: Datastore) -> None:
    build_index(store, SHARDS)
    first, second = (store.folder / f"index.part-0000{number}.faiss" for number in range(2))
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    with pytest.raises(DatastoreError, match=r"part-00000.faiss is damaged"):
        open_index(store)


def test_another_layout_is_another_index(store: Datastore) -> None:
    build_index(store, SHARDS)
    whole = replace(SHARDS, layout="whole")
    with pytest.raises(
        DatastoreError, match=r"already holds another index: layout shards against whole .*overwrite: tr"
    ):
        build_index(store, whole)
    build_index(store, replace(whole, overwrite=True, part_entries=10_000))
    assert files(store) == ["index.faiss", "index.json", "manifest.json"]
    assert len(open_index(store)) == ENTRIES
    with pytest.raises(DatastoreError, match=r"index.faiss is one file, expected parts; build .* layout: shards"):
        open_parts(store, 0, 2)
    build_index(store, replace(SHARDS, overwrite=True))
    assert build_index(store, replace(SHARDS, part_entries=3)).parts == build_index(store, SHARDS).parts


def test_a_description_of_too_few_parts_is_refused(store: Datastore) -> None:
    build_index(store, SHARDS)
    from lightning_knnmt.storage.sealed import read_sealed, write_sealed

    content = read_sealed(store.folder / "index.json")
    write_sealed(store.folder / "index.json", content | {"parts": content["parts"][:2]})
    with pytest.raises(DatastoreError, match=r"index.json is damaged .its parts have 600 of 900 entries"):
        open_index(store)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_of_several_processes_make_up_the_index(store: Datastore, size: int) -> None:
    build_index(store, replace(SHARDS, factory="Flat"))
    shares = [open_parts(store, rank, size) for rank in range(size)]
    assert sum(len(share) for share in shares) == ENTRIES
    ids = np.concatenate([share.search(QUERIES, ENTRIES)[1] for share in shares], axis=1)
    for row in ids:
        assert sorted(row[row >= 0]) == list(range(ENTRIES))
    assert sum(len(share) == 0 for share in shares) == max(0, size - 3)


def test_an_empty_datastore_has_one_empty_part(tmp_path: Path) -> None:
    with write_store(tmp_path / "empty", KEYS[:0], VALUES[:0]) as store:
        config = IndexConfig(layout="shards")
        report = build_index(store, config)
        assert [part.entries for part in report.parts] == [0]
        assert build_index(store, config) == report
        assert open_index(store).search(QUERIES, 2)[1].tolist() == [[-1, -1]] * len(QUERIES)


@pytest.mark.parametrize("chunk", [1, 64, 1000])
def test_mapped_keys_and_keys_of_a_range_are_those_of_the_store(tmp_path: Path, chunk: int) -> None:
    with numbered_store(tmp_path / "numbered", [30, 0, 1, 50, 0]) as store:
        keys = MappedKeys(store)
        everything = np.concatenate(list(store.key_chunks()))
        for entries in (range(81), range(29, 32), range(30, 30), range(31, 81), range(40, 60)):
            found = [np.empty((0, 2), np.float16), *store.key_chunks(chunk, entries)]
            assert np.concatenate(found).tolist() == everything[entries.start : entries.stop].tolist()
            assert max(map(len, found)) <= chunk
        rows = np.array([0, 3, 29, 30, 31, 80])
        assert keys.rows(rows).tolist() == everything[rows].tolist()
        assert len(keys) == 81 and keys.rows(rows[:0]).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "pieces"}, "layout is 'pieces', expected one of whole, shards"),
        ({"part_entries": 0}, "part_entries is 0, expected 1 or more"),
    ],
)
def test_options_of_parts_are_checked(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexConfig(**options)


def test_an_index_described_before_there_were_parts_still_opens(store: Datastore) -> None:
    from lightning_knnmt.storage.sealed import read_sealed, write_sealed

    report = build_index(store, IndexConfig("Flat"))
    content = read_sealed(store.folder / "index.json")
    assert content.pop("parts") == []
    write_sealed(store.folder / "index.json", content)
    assert json.loads((store.folder / "index.json").read_text()).get("parts") is None
    assert build_index(store, IndexConfig("Flat")) == report
    assert len(open_index(store)) == ENTRIES and verify(store.folder) == []
