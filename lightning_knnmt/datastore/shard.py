"""One HDF5 file of keys and values, with the sentences that they come from."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import h5py
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.data.pairs import Pair

KEY_DTYPE = np.float16


class ShardWriter:
    """Writes a shard beside its final place and renames it when the block ends well.

    Args:
        path: Final path of the HDF5 file.
        entries: How many entries it will hold.
        pairs: How many sentence pairs it will hold.
        key_size: D.
    """

    def __init__(self, path: Path, entries: int, pairs: int, key_size: int) -> None:
        self.path = path
        self.entries, self.pairs = entries, pairs
        self._partial = path.with_name(path.name + ".partial")
        self._file = h5py.File(self._partial, "w")
        text = h5py.string_dtype("utf-8")
        self._keys = self._file.create_dataset("keys", (entries, key_size), KEY_DTYPE)
        self._values = self._file.create_dataset("values", (entries,), np.int32)
        self._lengths = self._file.create_dataset("lengths", (pairs,), np.int32)
        self._numbers = self._file.create_dataset("numbers", (pairs,), np.int64)
        self._texts = {name: self._file.create_dataset(name, (pairs,), text) for name in ("src", "tgt", "document")}
        self._entry = self._pair = 0

    def append(
        self, keys: NDArray[np.float16], values: NDArray[np.int32], lengths: Sequence[int], pairs: Sequence[Pair],
        numbers: Sequence[int],
    ) -> None:  # fmt: skip
        """Add the entries of some sentence pairs.

        Args:
            keys: Shape (N, D).
            values: Shape (N,).
            lengths: Entries of each pair; they add up to N.
            pairs: The sentence pairs.
            numbers: Each pair's number in the corpus.
        """
        entries, rows = slice(self._entry, self._entry + len(keys)), slice(self._pair, self._pair + len(pairs))
        self._keys[entries] = keys
        self._values[entries] = values
        self._lengths[rows] = lengths
        self._numbers[rows] = numbers
        for name, dataset in self._texts.items():
            dataset[rows] = [getattr(pair, name) for pair in pairs]
        self._entry, self._pair = entries.stop, rows.stop

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        if kind is not None:
            self._partial.unlink(missing_ok=True)
            return
        if (self._entry, self._pair) != (self.entries, self.pairs):
            self._partial.unlink(missing_ok=True)
            raise RuntimeError(
                f"{self.path} got {self._entry} entries of {self._pair} pairs, expected {self.entries} of {self.pairs}"
            )
        with self._partial.open("rb") as file:
            os.fsync(file.fileno())
        self._partial.replace(self.path)
