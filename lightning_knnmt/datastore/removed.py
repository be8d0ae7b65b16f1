"""Entries that were removed from a datastore and are still in its shards and indexes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.checks import check_types
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_problem, file_sha256
from lightning_knnmt.storage.layout import removed_number
from lightning_knnmt.storage.sealed import read_sealed, write_sealed


@dataclass(frozen=True)
class RemovedInfo:
    """What a manifest says of the entries that were removed.

    Attributes:
        file: Name in the datastore's folder of the file that has their numbers.
        entries: How many they are.
        sha256: Checksum of the file.
    """

    file: str
    entries: int
    sha256: str

    def __post_init__(self) -> None:
        check_types(self)
        if removed_number(self.file) is None:
            raise ValueError(f"it names the file {self.file!r} of removed entries, expected a name removed-NUMBER.json")

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file, in words that follow its name."""
        return file_problem(folder / self.file, self.sha256, "restore it, or build the datastore again")


class Removed:
    """Numbers of removed entries, as ranges in ascending order that do not touch.

    Args:
        starts: First entry of each range, shape (M,).
        stops: The entry after the last of each range, shape (M,).
    """

    def __init__(self, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> None:
        self.starts, self.stops = starts, stops

    @classmethod
    def none(cls) -> "Removed":
        """No entries."""
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def of(cls, starts: NDArray[np.int64], stops: NDArray[np.int64]) -> "Removed":
        """The union of ranges that do not overlap, in any order; those that follow each other become one."""
        order = np.argsort(starts)
        starts, stops = starts[order], stops[order]
        begins = np.concatenate([[True], starts[1:] != stops[:-1]])
        return cls(starts[begins], stops[np.concatenate([begins[1:], [True]])])

    def __len__(self) -> int:
        return int((self.stops - self.starts).sum())

    def covers(self, entries: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of some entries were removed, in the shape of `entries`; −1 was not."""
        if not len(self.starts):
            return np.zeros(entries.shape, bool)
        place = np.searchsorted(self.starts, entries, side="right") - 1
        return (place >= 0) & (entries < self.stops[place])

    def save(self, folder: Path, file: str) -> RemovedInfo:
        """Write the numbers, whole or not at all.

        Raises:
            DatastoreError: They could not be written.
        """
        write_sealed(folder / file, {"starts": self.starts.tolist(), "stops": self.stops.tolist()})
        return RemovedInfo(file, len(self), file_sha256(folder / file))

    @classmethod
    def load(cls, folder: Path, info: RemovedInfo | None, total: int) -> "Removed":
        """Read what a manifest names.

        Args:
            folder: The datastore's.
            info: What the manifest says; None: nothing was removed.
            total: Entries of the datastore.

        Raises:
            DatastoreError: The file is missing or damaged, or names entries that there are not.
        """
        if info is None:
            return cls.none()
        path = folder / info.file
        if (problem := info.problem(folder)) is not None:
            raise DatastoreError(f"{path} {problem}")
        try:
            content = read_sealed(path)
            bounds = np.array([content["starts"], content["stops"]])
            if bounds.dtype != np.int64 or bounds.ndim != 2:
                raise ValueError("it does not hold two lists of numbers")
            ends = np.concatenate([[0], bounds.T.ravel(), [total]])  # each start before its stop before the next start
            if (ends[1:] < ends[:-1]).any() or (bounds[0] == bounds[1]).any():
                raise ValueError(f"its ranges are not in ascending order within 0 to {total}")
            removed = cls(*bounds)
            if len(removed) != info.entries:
                raise ValueError(f"it names {len(removed)} entries, and the manifest {info.entries}")
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise DatastoreError(f"{path} is damaged ({error}); build the datastore again") from error
        return removed
