"""Parts of an index that is being built: each is whole or not there, so that a build which is stopped continues."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import faiss

from lightning_knnmt.building.trained import Training
from lightning_knnmt.index.faiss_index import write_index
from lightning_knnmt.index.report import IndexPart
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import part_file
from lightning_knnmt.storage.sealed import read_sealed, write_sealed


def part_ranges(shards: Sequence[int], least: int) -> list[range]:
    """The entries of each part: those of whole shards, until there are enough; at least one part.

    Args:
        shards: Entries of each shard.
        least: Least number of entries of a part, but for the last.

    >>> part_ranges([5, 5, 5, 5, 5], 10)
    [range(0, 10), range(10, 20), range(20, 25)]
    """
    ranges, start, stop = [], 0, 0
    for entries in shards:
        stop += entries
        if stop - start >= least:
            ranges.append(range(start, stop))
            start = stop
    if start < stop or not ranges:
        ranges.append(range(start, stop))
    return ranges


@dataclass(frozen=True)
class Parts:
    """Where the parts of an index are, and what tells a whole part of this build.

    Attributes:
        folder: The datastore's.
        name: The index's, with the number of the datastore's generation.
        training: What decided the outcome of training.
        trained_sha256: Checksum of the trained index that all parts begin as.
        ranges: The entries of each part.
    """

    folder: Path
    name: str
    training: Training
    trained_sha256: str
    ranges: list[range]

    def file(self, number: int) -> Path:
        """The file of a part."""
        return part_file(self.folder, self.name, number)

    def save(self, number: int, index: faiss.Index) -> None:
        """Write a part, then the description that makes it count.

        Raises:
            DatastoreError: It could not be written.
        """
        description = self.file(number).with_suffix(".json")
        description.unlink(missing_ok=True)
        sha256 = write_index(index, self.file(number))
        write_sealed(description, {**self._expected(number), "faiss_sha256": sha256})

    def finished(self, number: int) -> IndexPart | None:
        """A part that this build has left before, if every byte is as it was written."""
        try:
            content = read_sealed(self.file(number).with_suffix(".json"))
            sha256 = content.pop("faiss_sha256")
            if content != self._expected(number) or file_sha256(self.file(number)) != sha256:
                return None
            return IndexPart(len(self.ranges[number]), sha256)
        except (OSError, ValueError, KeyError, DatastoreError):  # not there, or damaged: add its entries again
            return None

    def _expected(self, number: int) -> dict[str, object]:
        entries = self.ranges[number]
        return {
            "training": asdict(self.training),
            "trained_sha256": self.trained_sha256,
            "first": entries.start,
            "entries": len(entries),
        }


def remove_parts(folder: Path, name: str, kept: int = 0) -> None:
    """Remove what building has left.

    Args:
        folder: The datastore's.
        name: The index's.
        kept: How many parts belong to the finished index; their descriptions go, too, since the index has its own.
    """
    for path in folder.glob(f"{name}.part-*"):
        found = re.fullmatch(r"\.part-(\d{5,})\.(faiss|json)(\.partial)?", path.name.removeprefix(name))
        if found and not (int(found[1]) < kept and found[2] == "faiss" and not found[3]):
            path.unlink()
