"""Opening a datastore looks at what is in its files, and says which of them is wrong."""

import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import faiss
import h5py
import numpy as np
import pytest
import torch
from tiny_stores import clumpy_keys, write_store

import translate
from lightning_knnmt.building.index import build_index
from lightning_knnmt.cli import run_script
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.manifest import Manifest, ShardInfo
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.faiss_index import read_index
from lightning_knnmt.memory import DatastoreMemory, open_memory
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "store"
    with write_store(folder, *clumpy_keys(300, 8), [200, 100]) as store:
        build_index(store, IndexConfig("IVF4,SQ8"))
    return folder


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


@pytest.mark.parametrize("name", ["shard-00001.h5", "index.faiss", "index.json", "manifest.json"])
def test_a_flipped_bit_of_a_small_store_is_found_when_it_is_opened(folder: Path, name: str) -> None:
    bits = 8 * (folder / name).stat().st_size
    for bit in np.random.default_rng(1).integers(0, bits, 20).tolist():
        flip(folder / name, bit)
        with pytest.raises(DatastoreError, match=name.replace(".", r"\.")):
            open_memory(folder)
        flip(folder / name, bit)
    open_memory(folder).close()


def test_checksums_can_be_left_out_and_are_where_a_store_is_large(folder: Path, monkeypatch: Any) -> None:
    with h5py.File(folder / "shard-00000.h5", "a") as file:
        file["keys"][0] = 7
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 is damaged \(its checksum is another\)"):
        Datastore(folder)
    Datastore(folder, checksums=False).close()
    monkeypatch.setattr("lightning_knnmt.datastore.store.SMALL", 10)
    Datastore(folder).close()
    open_memory(folder).close()
    with pytest.raises(DatastoreError, match="its checksum is another"):
        open_memory(folder, checksums=True)


def test_a_script_compares_the_checksums_of_a_large_store_where_asked(
    folder: Path, monkeypatch: Any, capsys: Any
) -> None:
    flip(folder / "shard-00000.h5", 8 * (folder / "shard-00000.h5").stat().st_size - 1)
    monkeypatch.setattr("lightning_knnmt.datastore.store.SMALL", 10)
    options = ["--backbone.model", str(folder / "no model"), "--datastore", str(folder), "--input", os.devnull]
    for checksums, message in {"true": "shard-00000.h5 is damaged", "false": "no model"}.items():
        with pytest.raises(SystemExit):
            run_script(translate.translate, [*options, "--checksums", checksums])
        assert message in capsys.readouterr().err


def change_shard(folder: Path, change: Callable[[h5py.File], object]) -> None:
    """Change a shard as somebody who can compute checksums would."""
    path = folder / "shard-00001.h5"
    with h5py.File(path, "a") as file:
        change(file)
    manifest = Manifest.load(folder)
    shard = manifest.shards[1]
    changed = ShardInfo(shard.file, shard.entries, shard.pairs, file_sha256(path))
    Manifest(**(vars(manifest) | {"shards": (manifest.shards[0], changed)})).save(folder)


@pytest.mark.parametrize("length", [0, -1, 2, 2**31 - 1])
def test_lengths_that_do_not_add_up_do_not_open(folder: Path, length: int) -> None:
    change_shard(folder, lambda file: file["lengths"].__setitem__(3, length))
    with pytest.raises(DatastoreError, match=r"shard-00001.h5 is damaged \((it holds a pair of|its pairs have)"):
        Datastore(folder)


@pytest.mark.parametrize("value", [-1, 40, 10**6, 2**31 - 1])
def test_values_that_are_no_tokens_are_refused(folder: Path, value: int, monkeypatch: pytest.MonkeyPatch) -> None:
    change_shard(folder, lambda file: file["values"].__setitem__(3, value))
    with (
        Datastore(folder) as store,
        pytest.raises(DatastoreError, match=f"the value {value}, exp"),
    ):
        model = SimpleNamespace(vocabulary_size=40, name="m")
        monkeypatch.setattr("lightning_knnmt.datastore.store.Provenance.of", lambda _: store.manifest.provenance)
        store.check(model)  # type: ignore[arg-type]


def test_an_index_with_other_entry_numbers_is_refused(folder: Path) -> None:
    store = Datastore(folder)
    index = faiss.IndexIDMap2(faiss.IndexFlatL2(8))
    index.add_with_ids(np.zeros((300, 8), np.float32), np.arange(2**40, 2**40 + 300))

    class Wrong:
        key_size, nlist = 8, None

        def __len__(self) -> int:
            return 300

        def search(self, queries: np.ndarray, k: int, *_: Any) -> Any:
            return index.search(queries, k)

    with DatastoreMemory(store, Wrong()) as memory, pytest.raises(DatastoreError, match=r"found entry 1\d+, expected"):
        memory.search(torch.zeros(1, 8), 4)


def test_an_index_that_claims_to_be_huge_is_refused(tmp_path: Path) -> None:
    index = faiss.IndexFlatL2(4)
    index.add(np.zeros((3, 4), np.float32))
    path = tmp_path / "index.faiss"
    faiss.write_index(index, str(path))
    content = path.read_bytes()
    place = content.index((12 * 4).to_bytes(8, "little")) if (12 * 4).to_bytes(8, "little") in content else -1
    place = place if place >= 0 else content.index((12).to_bytes(8, "little"))
    path.write_bytes(content[:place] + (2**36).to_bytes(8, "little") + content[place + 8 :])
    with pytest.raises(ValueError, match=r"index.faiss is not an index that FAISS can read"):
        read_index(path)


@pytest.mark.parametrize("name", ["shard-00000.h5", "index.faiss", "index.json", "manifest.json"])
def test_pipes_and_devices_in_the_folder_are_refused(folder: Path, name: str) -> None:
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(DatastoreError, match=name.replace(".", r"\.")):
        open_memory(folder)
    (folder / name).unlink()
    (folder / name).symlink_to("/dev/zero")
    with pytest.raises(DatastoreError, match=name.replace(".", r"\.")):
        open_memory(folder)


@pytest.mark.parametrize(
    "factory",
    ["IVF0,Flat", "HNSW0", "HNSW1", "NSG0", "HNSW100000000", "PCA0,Flat", "IVF99999999999,Flat", "Flat," * 80_000],
)
def test_factory_strings_that_would_end_the_process_are_refused(factory: str) -> None:
    with pytest.raises(ValueError, match="factory is") as error:
        IndexConfig(factory)
    assert len(str(error.value)) < 200
