"""Stores that change: what is appended, removed or compacted against stores that were built in one."""

import json
import logging
import shutil
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from living_stores import FACTORIES, NEW, OLD, K, appending, contents, found, make_built, make_grown, queries
from script_runs import write_config
from tiny_stores import build_store, by_place, harm_file, write_corpus

import build_index as script
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.compact import compact
from lightning_knnmt.building.datastore import build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import load_index, open_index, open_parts, read_report
from lightning_knnmt.memory import open_memory
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import BUILDING


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


def assert_same_neighbors(
    ours: list[dict[tuple[Pair, int], float]], theirs: list[dict[tuple[Pair, int], float]]
) -> None:
    """Equal but for the last bits of keys that were encoded in other batches."""
    for one, other in zip(ours, theirs, strict=True):
        assert len(one) == len(other) == K
        np.testing.assert_allclose(sorted(one.values()), sorted(other.values()), rtol=1e-2, atol=1e-3)
        farthest = max(other.values())
        for place, distance in one.items():
            if distance < 0.99 * farthest:
                assert other[place] == pytest.approx(distance, rel=1e-2, abs=1e-3)


def test_an_appended_store_is_one_that_was_built_with_all_pairs(
    backbone: KeyedModel, grown: Path, tmp_path: Path
) -> None:
    assert verify(grown) == []
    with Datastore(grown) as store, build_store(backbone, tmp_path / "whole", [*OLD, *NEW]) as whole:
        build_index(whole, IndexConfig("Flat", name="flat"))
        ours, theirs = by_place(store, [*OLD, *NEW]), by_place(whole, [*OLD, *NEW])
        assert set(ours) == set(theirs)
        for place, (value, key) in ours.items():
            assert value == theirs[place][0]
            np.testing.assert_allclose(key, theirs[place][1], rtol=2e-3, atol=2e-3)
        assert sorted(store.sources()) == sorted(whole.sources())
        asked = queries(whole)
        assert_same_neighbors(found(store, "flat", asked), found(whole, "flat", asked))


@pytest.mark.parametrize("name", FACTORIES)
def test_every_index_finds_appended_entries_at_once(built: Path, grown: Path, name: str) -> None:
    with Datastore(built) as store:
        before, lists = len(store), load_index(store, name).list_sizes()
    with Datastore(grown) as store:
        index, report = open_index(store, name), read_report(store, name)
        keys = np.concatenate(list(store.key_chunks()))[before:].astype(np.float32)
        ef_search = 200 if name == "graph" else None  # enough for the graph to miss none
        distances, ids = index.search(keys, 4, nprobe=4, ef_search=ef_search)
        new = np.maximum(ids - before, 0)
        hits = (ids >= before) & (keys[new] == keys[:, None]).all(2)  # several entries may have the same key
        assert np.mean(hits.any(1)) > 0.9
        if name in ("flat", "ivf", "graph"):  # the others estimate distances
            assert distances[:, 0].max() < 1e-3
        assert (report.entries, report.added, len(index)) == (len(store), len(store) - before, len(store))
        if lists is not None:
            assert (index.list_sizes() >= lists).all()
            assert report.trained_imbalance_factor is not None
        if name == "parts":
            shares = [open_parts(store, rank, 2, name) for rank in range(2)]
            assert sum(map(len, shares)) == len(store)
    assert not list(grown.glob("*.partial"))


def test_pairs_that_are_stored_are_not_appended_again(
    backbone: KeyedModel, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = [NEW[0], NEW[0], *NEW[:3], OLD[0], replace(OLD[0], document="elsewhere")]
    change = append_pairs(backbone, appending(folder, again))
    assert (change.pairs, change.known) == (4, 3)
    before = contents(folder)
    monkeypatch.setattr(backbone, "keys", None)  # encoding would fail
    change = append_pairs(backbone, appending(folder, again))
    assert (change.pairs, change.known) == (0, 7)
    assert contents(folder) == before
    with Datastore(folder) as store:
        numbers = {store.context(entry).number: store.context(entry).pair for entry in range(len(store))}
    assert len(numbers) == len(OLD) + 4  # each pair has a number of its own, also those of later corpora
    assert numbers[len(OLD)] == NEW[0]


def test_building_again_keeps_a_store_that_was_appended_to(backbone: KeyedModel, folder: Path) -> None:
    append_pairs(backbone, appending(folder))
    before = contents(folder)
    config = replace(appending(folder), corpus=write_corpus(folder / "corpus.jsonl", OLD))
    assert build_datastore(backbone, config).kept
    with Datastore(folder) as store:
        for name, index in FACTORIES.items():
            build_index(store, replace(index, name=name))
    assert contents(folder) == before
    harm_file(folder / Manifest.load(folder).shards[-1].file, "missing")
    with pytest.raises(DatastoreError, match=r"is missing or damaged, and pairs were appended or removed since"):
        build_datastore(backbone, config)
    build_datastore(backbone, replace(config, overwrite=True))
    assert not list(folder.glob("flat.*"))  # of another generation
    with Datastore(folder) as store:
        assert {store.context(entry).pair for entry in range(len(store))} == set(OLD)


def test_removed_documents_are_never_found(folder: Path) -> None:
    with Datastore(folder) as store:
        asked = queries(store)
        everything = {name: found(store, name, asked, k=len(store)) for name in FACTORIES}
        shards = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    done = remove_documents(folder, ["page-1"])
    assert done.pairs == sum(pair.document == "page-1" for pair in OLD)
    assert verify(folder) == []
    with Datastore(folder) as store:
        assert (len(store), len(store.removed)) == (done.total, done.removed)
        assert sorted(store.sources()) == sorted(pair.src for pair in OLD if pair.document != "page-1")
        for name, k in product(FACTORIES, (1, K, len(store))):
            for near, all_of_them in zip(found(store, name, asked, k), everything[name], strict=True):
                left = {place: d for place, d in all_of_them.items() if place[0].document != "page-1"}
                assert all(pair.document != "page-1" for pair, _ in near)
                if name != "graph":
                    assert len(near) == min(k, len(store) - done.removed)
                if name in ("flat", "ivf", "parts"):  # the others look at a part of what they have
                    assert sorted(near.values()) == pytest.approx(sorted(left.values())[:k])
        for share in (open_parts(store, rank, 3, "parts", mmap=True) for rank in range(3)):
            ids = share.search(asked, K)[1]
            assert (ids >= 0).any() and not store.removed.covers(ids).any()
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.h5")} == shards


def test_removed_documents_can_be_appended_again_and_others_removed_later(backbone: KeyedModel, folder: Path) -> None:
    done = remove_documents(folder, ["page-1"])
    again = remove_documents(folder, ["page-1"])
    assert (again.pairs, again.entries, again.removed) == (0, 0, done.removed)
    assert append_pairs(backbone, appending(folder, OLD)).pairs == done.pairs
    with Datastore(folder) as store:
        assert sorted(store.sources()) == sorted(pair.src for pair in OLD)
    more = remove_documents(folder, ["page-1", "page-2"])
    assert more.pairs == sum(pair.document != "page-0" for pair in OLD)
    with Datastore(folder) as store:
        asked = queries(store)
        for name in FACTORIES:
            assert {pair.document for near in found(store, name, asked) for pair, _ in near} == {"page-0"}
    assert [path.name for path in folder.glob("removed*")] == ["removed-2.json"]


def test_a_store_without_anything_left_finds_nothing(folder: Path) -> None:
    remove_documents(folder, ["page-0", "page-1", "page-2"])
    with Datastore(folder) as store:
        for name in FACTORIES:
            distances, ids = open_index(store, name).search(queries(store), K)
            assert (ids == -1).all() and np.isinf(distances).all()
        assert list(store.sources()) == []
    with pytest.raises(ValueError, match=r"factory is 'IVF4,.*only 0 training points"):
        compact(folder)


def test_a_compacted_store_is_one_built_with_the_remaining_pairs(
    backbone: KeyedModel, grown: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(grown, tmp_path / "store")
    remove_documents(folder, ["page-1"])
    change = compact(folder)
    rest = [pair for pair in [*OLD, *NEW] if pair.document != "page-1"]
    assert change.pairs == len(OLD) + len(NEW) - len(rest)
    assert verify(folder) == []
    shards = change.manifest.shards
    assert sorted(path.name for path in folder.glob("*.h5")) == [shard.file for shard in shards]
    assert [shard.pairs for shard in shards[:-1]] == [4] * (len(shards) - 1) and shards[-1].pairs <= 4
    assert not list(folder.glob("removed*")) and not (folder / BUILDING).exists()
    with Datastore(folder) as store, build_store(backbone, folder.parent / "whole", rest) as whole:
        by_place(store, [*OLD, *NEW])
        asked = queries(whole)
        build_index(whole, replace(FACTORIES["flat"], name="flat"))
        assert_same_neighbors(found(store, "flat", asked), found(whole, "flat", asked))
        assert len(store) == len(whole)
        assert sorted(store.values.tolist()) == sorted(whole.values.tolist())
        for name, config in FACTORIES.items():
            report = change.indexes[name]
            assert (report.factory, report.added, report.entries) == (config.factory, 0, len(store))
            open_index(store, name).search(asked, K)
    before = contents(folder)
    assert compact(folder).pairs == 0  # nothing is left to do
    assert contents(folder) == before


def test_training_again_is_advised_when_an_index_has_changed_much(
    backbone: KeyedModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    same = [Pair(f"{number} Datei", ".", "same") for number in range(400)]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        append_pairs(backbone, appending(folder, NEW[:2]))
        assert caplog.text == ""
        append_pairs(backbone, appending(folder, same))
    assert "index ivf: " in caplog.text and "entries came after it was trained" in caplog.text
    assert "imbalance factor has grown from" in caplog.text
    assert "index flat" not in caplog.text  # which is not trained
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert compact(folder).indexes["ivf"].added == 0
        assert caplog.text == ""


def test_an_open_reader_works_on_while_others_change_the_store(backbone: KeyedModel, folder: Path) -> None:
    with Datastore(folder) as store, Datastore(folder) as late:
        asked = queries(store)
        indexes = {name: open_index(store, name, mmap=True) for name in FACTORIES}
        before = {name: index.search(asked, K)[1].tolist() for name, index in indexes.items()}
        append_pairs(backbone, appending(folder))
        remove_documents(folder, ["page-0"])
        compact(folder)
        assert {name: index.search(asked, K)[1].tolist() for name, index in indexes.items()} == before
        assert {store.context(entry).pair for entry in range(len(store))} == set(OLD)
        rows = MappedKeys(store).rows(np.arange(len(store)))  # as for exact distances, from files that are gone by now
        assert (rows == np.concatenate(list(store.key_chunks()))).all()
        with pytest.raises(DatastoreError, match="was changed after it was opened; open it again"):
            open_index(late, "flat")


def test_a_store_lives_through_the_command_line(
    marian_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = tmp_path / "store"
    old, new = (write_corpus(tmp_path / f"{name}.jsonl", pairs) for name, pairs in (("old", OLD), ("new", NEW)))
    config = {
        "backbone": {"model": marian_folder, "device": "cpu"},
        "datastore": {"folder": store, "corpus": {"path": old.path}},
        "index": {"factory": "IVF4,PQ4x4fs,Refine(SQfp16)"},
    }
    built = write_config(tmp_path / "build.yaml", config)
    script.main(["build", "--config", str(built)])
    script.main(["append", "--config", str(built), "--datastore.corpus.path", str(new.path)])
    assert "15 pairs appended, 0 were stored before" in capsys.readouterr().err
    backbone = load_model(str(marian_folder), device="cpu")

    def documents() -> set[str]:
        with open_memory(store) as memory:
            memory.check(backbone)
            keys, _ = backbone.keys_and_logits(backbone.batch([pair.src for pair in NEW], [pair.tgt for pair in NEW]))
            ids = memory.search(keys.flatten(0, 1), k=50, nprobe=4, rescore=60).ids
            return {memory.context(int(entry)).pair.document for entry in ids.unique() if entry >= 0}

    assert documents() == {"page-0", "page-1", "page-2"}
    script.main(["remove", "--folder", str(store), "--document", "page-0", "--document=page-2"])
    assert documents() == {"page-1"}
    script.main(["verify", "--folder", str(store)])
    script.main(["compact", "--folder", str(store)])
    script.main(["verify", "--folder", str(store)])
    assert documents() == {"page-1"}
    assert json.loads((store / "manifest.json").read_text())["generation"] == 2
    capsys.readouterr()
    with pytest.raises(SystemExit):
        script.main(["remove", "--folder", str(store), "--document", "page-3"])
    assert "did you mean 'page-1'" in capsys.readouterr().err
