"""What is damaged, hostile or unfinished does not open, and says so."""

import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from tiny_stores import harm_file, numbered_store

from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.shard import ShardWriter
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import PartialFile
from lightning_knnmt.storage.sealed import write_sealed


@pytest.mark.parametrize(
    ("harm", "message"), [("missing", "shard-00001.h5 is missing"), ("truncated", "shard-00001.h5 is damaged")]
)
def test_a_datastore_with_a_missing_or_truncated_shard_does_not_open(tmp_path: Path, harm: str, message: str) -> None:
    numbered_store(tmp_path / "store", [70, 5, 125]).close()
    harm_file(tmp_path / "store" / "shard-00001.h5", harm)
    with pytest.raises(DatastoreError, match=f"{message}.*build the datastore again"):
        Datastore(tmp_path / "store")


def test_a_shard_of_another_size_or_kind_does_not_open(tmp_path: Path) -> None:
    numbered_store(tmp_path / "store", [70, 5]).close()
    numbered_store(tmp_path / "other", [71, 5]).close()
    path = tmp_path / "store" / "shard-00000.h5"
    (tmp_path / "other" / "shard-00000.h5").replace(path)
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 holds keys of shape \(71, 2\), expected \(70, 2\)"):
        Datastore(tmp_path / "store")
    with h5py.File(path, "a") as file:
        del file["lengths"], file["values"]
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 lacks lengths, values; build the datastore again"):
        Datastore(tmp_path / "store")


def sealed(**changes: object) -> Callable[[Path], None]:
    """Change fields as somebody who can compute checksums would."""

    def change(path: Path) -> None:
        content = json.loads(path.read_text())
        del content["sha256"]
        write_sealed(path, content | changes)

    return change


def as_text(change: Callable[[str], str]) -> Callable[[Path], None]:
    return lambda path: path.write_text(change(path.read_text())) and None


SHARD = {"file": "shard-00000.h5", "entries": 7, "pairs": 7, "sha256": "0" * 64}


PROVENANCE = {
    "model": "m", "model_sha256": "0", "tokenizer_sha256": "0", "key_type": "decoder_output", "key_size": 2,
    "src_lang": None, "tgt_lang": None,
}  # fmt: skip


def shard(**changes: object) -> Callable[[Path], None]:
    return sealed(shards=[SHARD | changes])


def provenance(**changes: object) -> Callable[[Path], None]:
    return sealed(provenance=PROVENANCE | changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_text(lambda text: text[: len(text) // 2]), "is damaged .*build the datastore again"),
        (as_text(lambda text: "[1, 2]"), "is damaged .it holds list, expected an object"),
        (as_text(lambda text: text.replace('"corpus": "none"', '"corpus": "nine"')), "its checksum does not fit"),
        (as_text(lambda text: text + " "), "its checksum does not fit its content"),
        (as_text(lambda text: "[" * 100_000 + "]" * 100_000), "is damaged .it is nested too deeply"),
        (
            as_text(lambda text: text.replace('"reading": {}', '"reading": ' + '{"a":' * 900 + "1" + "}" * 900)),
            "damaged",
        ),
        (as_text(lambda text: text.replace('"format"', '"fmt"')), "has format None, expected 2; build it again"),
        (sealed(format=99), "has format 99, expected 2; build it again"),
        (sealed(keysize=7), "is damaged .*keysize"),
        (sealed(shards=5), "is damaged"),
        (sealed(shards=[5]), "is damaged"),
        (sealed(shards=[SHARD, SHARD]), "it names shard-00000.h5 more than once"),
        (sealed(provenance=None), "is damaged"),
        (sealed(reading=[]), "reading is '\\[\\]', expected dict"),
        (shard(file="../outside.h5"), r"names the shard '../outside.h5', expected a file name NAME.h5 without folders"),
        (shard(file="/etc/passwd"), "names the shard '/etc/passwd'"),
        (shard(file=".."), "names the shard '..'"),
        (shard(file=""), "names the shard ''"),
        (shard(file=5), "file is '5', expected str"),
        (shard(entries=-1), "entries of shard-00000.h5 is -1, expected 0 to"),
        (shard(entries=10**18), "entries of shard-00000.h5 is 1000000000000000000, expected 0 to"),
        (shard(entries=10**15), r"shard-00000.h5 holds keys of shape \(7, 2\), expected \(1000000000000000, 2\)"),
        (shard(pairs=10**12), r"holds lengths of shape \(7,\), expected \(1000000000000,\)"),
        (shard(entries=7.0), "entries is '7.0', expected int"),
        (shard(entries=True), "entries is 'True', expected int"),
        (shard(entries="7"), "entries is '7', expected int"),
        (provenance(key_size=0), "key_size is 0, expected 1 to"),
        (provenance(key_size=10**18), "key_size is 1000000000000000000, expected 1 to"),
        (provenance(src_lang=[]), "src_lang is '\\[\\]', expected"),
    ],
)
def test_a_damaged_or_hostile_manifest_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    numbered_store(tmp_path / "store", [7]).close()
    change(tmp_path / "store" / "manifest.json")
    with pytest.raises(DatastoreError, match=message):
        Datastore(tmp_path / "store")


def replaced(name: str, **options: Any) -> Callable[[h5py.File], None]:
    """Put another dataset in the place of one."""

    def change(file: h5py.File) -> None:
        del file[name]
        file.create_dataset(name, **options)

    return change


def linked(link: object) -> Callable[[h5py.File], None]:
    def change(file: h5py.File) -> None:
        del file["keys"]
        file["keys"] = link

    return change


def virtual(file: h5py.File) -> None:
    del file["keys"]
    layout = h5py.VirtualLayout((7, 2), np.float16)
    layout[:] = h5py.VirtualSource("elsewhere.h5", "keys", (7, 2))
    file.create_virtual_dataset("keys", layout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("keys", shape=(7, 2), dtype=np.float16, external="/etc/passwd"), "keys that are not a plain array"),
        (linked(h5py.ExternalLink("/elsewhere.h5", "keys")), "holds keys that are not a plain array of its own"),
        (linked(h5py.SoftLink("/values")), "holds keys that are not a plain array of its own"),
        (virtual, "holds keys that are not a plain array of its own"),
        (replaced("keys", shape=(7, 2), dtype=np.float16, compression="gzip"), "keys that are not a plain array"),
        (replaced("keys", shape=(7, 2), dtype=np.float32), "holds keys of type float32, expected float16"),
        (replaced("keys", shape=(7, 2), dtype=np.float16), "holds only a part of its keys"),
        (replaced("values", shape=(10**12,), dtype=np.int32), r"holds values of shape .*, expected \(7,\)"),
        (replaced("src", data=np.arange(7)), "holds src of type int64, expected text"),
        (replaced("src", shape=(7,), dtype=h5py.ref_dtype), "holds src of type object, expected text"),
        (replaced("numbers", shape=(7,), dtype=h5py.vlen_dtype(np.int64)), "holds numbers of type object"),
    ],
)
def test_a_shard_that_holds_anything_but_plain_arrays_and_texts_is_refused(
    tmp_path: Path, change: Callable[[h5py.File], None], message: str
) -> None:
    numbered_store(tmp_path / "store", [7]).close()
    with h5py.File(tmp_path / "store" / "shard-00000.h5", "a") as file:
        change(file)
    with pytest.raises(DatastoreError, match=f"shard-00000.h5 .*{message}.*; build the datastore again"):
        Datastore(tmp_path / "store")


def test_a_shard_that_is_a_link_out_of_the_folder_is_refused_and_the_folder_may_be_one(tmp_path: Path) -> None:
    numbered_store(tmp_path / "store", [7]).close()
    (tmp_path / "link").symlink_to(tmp_path / "store")
    with Datastore(tmp_path / "link") as store:
        assert len(store) == 7
    path = tmp_path / "store" / "shard-00000.h5"
    path.rename(tmp_path / "outside.h5")
    path.symlink_to(tmp_path / "outside.h5")
    with pytest.raises(DatastoreError, match=r"shard-00000.h5 is a link to .*outside.h5, expected a file in the"):
        Datastore(tmp_path / "store")
    assert [problem.file for problem in verify(tmp_path / "store")] == ["shard-00000.h5"]


def test_writing_does_not_follow_a_link_that_somebody_has_put_in_its_way(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "shard-00000.h5.partial").symlink_to(tmp_path / "precious")
    (tmp_path / "store" / "manifest.json.partial").symlink_to(tmp_path / "precious")
    with ShardWriter(tmp_path / "store" / "shard-00000.h5", 0, 0, 2):
        pass
    write_sealed(tmp_path / "store" / "manifest.json", {})
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_shard_that_gets_too_little_is_not_finished(tmp_path: Path) -> None:
    path = tmp_path / "shard.h5"
    keys = np.eye(3, dtype=np.float16)
    with (
        pytest.raises(RuntimeError, match="got 3 entries of 1 pairs, expected 4 of 2"),
        ShardWriter(path, entries=4, pairs=2, key_size=3) as writer,
    ):
        writer.append(keys, np.arange(3, dtype=np.int32), [3], [Pair("a", "b")], [0])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("room", [0, 700, 5000, 10**6])
def test_a_file_on_a_full_disk_reads_as_if_all_had_been_written_and_keeps_the_error(tmp_path: Path, room: int) -> None:
    class Disk(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    file, twin = PartialFile(tmp_path / "file"), io.BytesIO()
    file._file.close()
    file._file = Disk()  # type: ignore[assignment]
    rng = np.random.default_rng(room)
    for _ in range(300):
        position, size = int(rng.integers(0, 8000)), int(rng.integers(0, 900))
        if rng.random() < 0.6:
            content = rng.bytes(size)
            for either in (file, twin):
                either.seek(position)
                either.write(content)
        else:
            buffer, expected = bytearray(size), bytearray(size)
            assert file.seek(position) == twin.seek(position)
            assert file.readinto(buffer) == twin.readinto(expected)
            assert buffer == expected
        assert file.tell() == twin.tell()
        assert file.seek(0, io.SEEK_END) == twin.seek(0, io.SEEK_END)
    if room < 10**6:
        with pytest.raises(OSError, match="No space left on device"):
            file.finish()
    else:
        file.check()
