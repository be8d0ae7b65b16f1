"""Whether every byte of a datastore and of its indexes is as it was written."""

from dataclasses import dataclass
from pathlib import Path

from lightning_knnmt.datastore.manifest import FILE_NAME, ShardInfo, read_manifest
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256, is_inside
from lightning_knnmt.storage.layout import description_file, find_indexes, generation_name, index_file, part_file
from lightning_knnmt.storage.sealed import read_sealed
from lightning_knnmt.storage.snapshot import open_together


@dataclass(frozen=True)
class Problem:
    """What is wrong with a file.

    Attributes:
        file: Its name in the datastore's folder.
        what: What is wrong, and what to do.
    """

    file: str
    what: str

    def __str__(self) -> str:
        return f"{self.file} {self.what}"


class _DamagedError(DatastoreError):
    def __init__(self, problems: list[Problem]) -> None:
        super().__init__("; ".join(map(str, problems)))
        self.problems = problems


def verify(folder: Path) -> list[Problem]:
    """Compare all files of a datastore and of its indexes with their checksums; nothing is changed.

    Every byte is read, and if others change the datastore meanwhile, what they have made of it. Opening a datastore
    looks at shapes and sizes only, which takes no time.

    Args:
        folder: The datastore's.

    Returns:
        What is wrong; nothing if all is well.
    """

    def check() -> None:
        if problems := _problems(folder):
            raise _DamagedError(problems)

    try:
        open_together(folder, check)
    except _DamagedError as damaged:
        return damaged.problems
    return []


def _problems(folder: Path) -> list[Problem]:
    try:
        manifest, fingerprint = read_manifest(folder)
    except DatastoreError as error:
        return [Problem(FILE_NAME, str(error))]
    problems = [problem for shard in manifest.shards if (problem := _shard_problem(folder, shard)) is not None]
    if (removed := manifest.removed) is not None and (wrong := removed.problem(folder)) is not None:
        problems.append(Problem(removed.file, wrong))
    for name in find_indexes(folder, manifest.generation):
        problems += _index_problems(folder, generation_name(name, manifest.generation), fingerprint)
    return problems


def _shard_problem(folder: Path, shard: ShardInfo) -> Problem | None:
    path = folder / shard.file
    if not path.is_file():
        return Problem(shard.file, "is missing; build the datastore again")
    if not is_inside(path, folder):
        return Problem(shard.file, f"is a link to {path.resolve()}, expected a file in the datastore's folder")
    if file_sha256(path) != shard.sha256:
        return Problem(shard.file, "is damaged (its checksum is another); build the datastore again")
    return None


def _index_problems(folder: Path, name: str, fingerprint: str) -> list[Problem]:
    index, description = index_file(folder, name), description_file(folder, name)
    if not description.is_file():
        return [Problem(description.name, f"is missing, so {index.name} is not whole; build the index again")]
    try:
        content = read_sealed(description)
        datastore, sums = content["datastore_sha256"], [content["faiss_sha256"]]
        sums += [part["faiss_sha256"] for part in content.get("parts", [])]
    except (ValueError, KeyError, TypeError, DatastoreError) as error:
        return [Problem(description.name, f"is damaged ({error}); build the index again")]
    problems = []
    if datastore != fingerprint:
        problems.append(Problem(description.name, "belongs to another datastore; build the index again"))
    for file, wanted in zip(
        [index, *(part_file(folder, name, part) for part in range(len(sums) - 1))], sums, strict=True
    ):
        if not file.is_file():
            problems.append(Problem(file.name, "is missing; build the index again"))
        elif file_sha256(file) != wanted:
            problems.append(Problem(file.name, "is damaged (its checksum is another); build the index again"))
    return problems
