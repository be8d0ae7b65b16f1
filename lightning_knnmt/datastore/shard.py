"""One HDF5 file of keys and values, with the sentences that they come from."""

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore.manifest import ShardInfo
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import durable_file, file_sha256, is_inside

KEY_DTYPE = np.float16
TEXTS = ("src", "tgt", "document")
OF_ENTRIES = ("positions", "weights")  # arrays that a shard has only where entries were dropped or merged
TEXT_REFERENCE = 16  # bytes that HDF5 keeps in the array of each text: length, address and number


class ShardWriter:
    """Writes a shard, which gets its name when the block ends well; the same entries give the same bytes.

    Args:
        path: Final path of the HDF5 file.
        entries: How many entries it will hold.
        pairs: How many sentence pairs it will hold.
        key_size: D.
        more: Of `OF_ENTRIES`, what it holds besides.
        key_dtype: Type of the keys.

    Raises:
        DatastoreError: At any time: it cannot be written.
    """

    def __init__(
        self, path: Path, entries: int, pairs: int, key_size: int, more: Sequence[str] = (), key_dtype: str = "float16"
    ) -> None:
        self.path = path
        self.entries, self.pairs = entries, pairs
        with ExitStack() as stack:
            self._target = stack.enter_context(durable_file(path))
            file = stack.enter_context(h5py.File(self._target, "w"))
            self._keys = file.create_dataset("keys", (entries, key_size), np.dtype(key_dtype))
            self._values = file.create_dataset("values", (entries,), np.int32)
            self._lengths = file.create_dataset("lengths", (pairs,), np.int32)
            self._numbers = file.create_dataset("numbers", (pairs,), np.int64)
            self._texts = {name: file.create_dataset(name, (pairs,), h5py.string_dtype("utf-8")) for name in TEXTS}
            self._more = {name: file.create_dataset(name, (entries,), np.int32) for name in more}
            self._stack = stack.pop_all()
        self._entry = self._pair = 0

    def append(
        self, keys: NDArray[np.floating], values: NDArray[np.int32], lengths: Sequence[int], pairs: Sequence[Pair],
        numbers: Sequence[int], **more: NDArray[np.int32],
    ) -> None:  # fmt: skip
        """Add the entries of some sentence pairs.

        Args:
            keys: Shape (N, D).
            values: Shape (N,).
            lengths: Entries of each pair; they add up to N.
            pairs: The sentence pairs.
            numbers: Each pair's number in the corpus.
            more: What was said to be held besides, shape (N,) each.
        """
        entries, rows = slice(self._entry, self._entry + len(keys)), slice(self._pair, self._pair + len(pairs))
        self._keys[entries] = keys
        self._values[entries] = values
        for name, dataset in self._more.items():
            dataset[entries] = more[name]
        self._lengths[rows] = lengths
        self._numbers[rows] = numbers
        for name, dataset in self._texts.items():
            dataset[rows] = [getattr(pair, name) for pair in pairs]
        self._target.check()
        self._entry, self._pair = entries.stop, rows.stop

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._stack.callback(self._check_full)
        self._stack.__exit__(kind, error, trace)

    def _check_full(self) -> None:
        if (self._entry, self._pair) != (self.entries, self.pairs):
            raise RuntimeError(
                f"{self.path} got {self._entry} entries of {self._pair} pairs, expected {self.entries} of {self.pairs}"
            )


def open_shard(
    folder: Path, shard: ShardInfo, key_size: int, checksum: bool = False, key_dtype: str = "float16"
) -> h5py.File:
    """Open a shard for reading, if it is as large as the manifest says and holds nothing but plain arrays and texts.

    Args:
        folder: The datastore's.
        shard: What the manifest says of it.
        key_size: D.
        checksum: Look at every byte; otherwise that is left to `verify`.
        key_dtype: Type of the keys.

    Raises:
        DatastoreError: It is missing or damaged, or leads out of the datastore's folder.
    """
    path = folder / shard.file
    if not path.exists():
        raise DatastoreError(f"{path} is missing; build the datastore again")
    if not is_inside(path, folder):
        raise DatastoreError(f"{path} is a link to {path.resolve()}, expected a file in the datastore's folder")
    if not path.is_file():
        raise DatastoreError(f"{path} is a folder, a pipe or a device, expected a file; build the datastore again")
    try:
        file = h5py.File(path, "r", locking=False)  # nobody writes to a finished shard
    except OSError as error:
        raise DatastoreError(f"{path} is damaged ({error}); build the datastore again") from error
    try:
        _check_contents(file, shard, key_size, np.dtype(key_dtype))
        if checksum and file_sha256(path) != shard.sha256:
            raise ValueError("is damaged (its checksum is another)")
    except (ValueError, KeyError, TypeError, RuntimeError, OSError) as error:  # those of HDF5 itself, too
        file.close()
        raise DatastoreError(f"{path} {error}; build the datastore again") from error
    return file


def map_keys(file: h5py.File) -> NDArray[Any]:
    """The keys of an open shard, shape (N, D), mapped into memory for longer than the shard stays open.

    Args:
        file: The shard, whose file may have been removed since it was opened.
    """
    keys = file["keys"]
    if not len(keys):  # nothing can be mapped
        return np.empty(keys.shape, keys.dtype)
    if os.name == "nt":  # which removes nothing that is open
        return np.memmap(file.filename, keys.dtype, "r", keys.id.get_offset(), keys.shape)
    with open(file.id.get_vfd_handle(), "rb", closefd=False) as same:
        return np.memmap(same, keys.dtype, "r", keys.id.get_offset(), keys.shape)


def values_of(file: h5py.File) -> NDArray[np.int32]:
    """The values of an open shard, shape (N,).

    Raises:
        DatastoreError: One is no token.
    """
    return _numbers_of(file, "values", "value", 0)


def weights_of(file: h5py.File) -> NDArray[np.int32] | None:
    """How many entries each of an open shard's stands for, shape (N,); None if each stands for itself.

    Raises:
        DatastoreError: One stands for none.
    """
    return _numbers_of(file, "weights", "weight", 1) if "weights" in file else None


def positions_of(file: h5py.File, starts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Place of each entry's token in its target, shape (N,).

    Args:
        file: The shard.
        starts: First entry of each pair, and the number of entries, shape (pairs + 1,).

    Raises:
        DatastoreError: One is below 0.
    """
    if "positions" in file:
        return _numbers_of(file, "positions", "position", 0).astype(np.int64)
    return np.arange(starts[-1]) - np.repeat(starts[:-1], np.diff(starts))


def _numbers_of(file: h5py.File, array: str, name: str, least: int) -> NDArray[np.int32]:
    numbers: NDArray[np.int32] = file[array][:]
    if numbers.min(initial=least) < least:
        raise DatastoreError(
            f"{file.filename} is damaged (it holds the {name} {numbers.min()}, expected {least} or more); build the "
            "datastore again"
        )
    return numbers


def _check_contents(file: h5py.File, shard: ShardInfo, key_size: int, key_dtype: np.dtype[Any]) -> None:
    expected: dict[str, tuple[tuple[int, ...], Any]] = {
        "keys": ((shard.entries, key_size), key_dtype),
        "values": ((shard.entries,), np.int32),
        "lengths": ((shard.pairs,), np.int32),
        "numbers": ((shard.pairs,), np.int64),
        **dict.fromkeys(TEXTS, ((shard.pairs,), None)),
        **{name: ((shard.entries,), np.int32) for name in OF_ENTRIES if name in file},
    }
    if missing := set(expected) - set(file):
        raise ValueError(f"lacks {', '.join(sorted(missing))}")
    for name, (shape, dtype) in expected.items():
        data = file[name] if isinstance(file.get(name, getlink=True), h5py.HardLink) else None
        if not isinstance(data, h5py.Dataset) or data.is_virtual or data.external or data.chunks:
            raise ValueError(f"holds {name} that are not a plain array of its own")
        if data.shape != shape:
            raise ValueError(f"holds {name} of shape {data.shape}, expected {shape}")
        if (h5py.check_string_dtype(data.dtype) is None) if dtype is None else (data.dtype != dtype):
            raise ValueError(f"holds {name} of type {data.dtype}, expected {np.dtype(dtype) if dtype else 'text'}")
        if data.id.get_storage_size() != data.size * (np.dtype(dtype).itemsize if dtype else TEXT_REFERENCE):
            raise ValueError(f"holds only a part of its {name}")
    lengths = file["lengths"][:]
    if lengths.min(initial=1) < 1:
        raise ValueError(f"is damaged (it holds a pair of {lengths.min()} entries, expected 1 or more)")
    if int(lengths.sum(dtype=np.int64)) != shard.entries:
        raise ValueError(f"is damaged (its pairs have {lengths.sum(dtype=np.int64)} of {shard.entries} entries)")
