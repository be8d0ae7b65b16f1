"""Whether every byte of a datastore and of its indexes is as it was written."""

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_knnmt.datastore.manifest import ShardInfo, read_manifest
from lightning_knnmt.datastore.removed import RemovedInfo
from lightning_knnmt.index.report import IndexReport
from lightning_knnmt.sentences.report import REMEDY, SentencesReport
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.storage.layout import (
    MANIFEST,
    find_indexes,
    find_sentences,
    generation_name,
    index_file,
    sentences_file,
)
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


def verify(folder: Path) -> list[Problem]:
    """Compare all files of a datastore and of its indexes with their checksums; nothing is changed.

    Every byte is read, and if others change the datastore meanwhile, what they have made of it. Opening a datastore
    looks at shapes and sizes only, which takes no time.

    Args:
        folder: The datastore's.

    Returns:
        What is wrong; nothing if all is well.
    """

    problems: list[Problem] = []

    def check() -> None:
        problems[:] = _problems(folder)
        if problems:
            raise DatastoreError("something is wrong")  # unless another manifest is in force by now

    with suppress(DatastoreError):
        open_together(folder, check)
    return problems


def _problems(folder: Path) -> list[Problem]:
    try:
        manifest, fingerprint = read_manifest(folder)
    except DatastoreError as error:
        return [Problem(MANIFEST, str(error))]
    files: list[ShardInfo | RemovedInfo] = [*manifest.shards]
    files += [] if manifest.removed is None else [manifest.removed]
    problems = [Problem(file.file, what) for file in files if (what := file.problem(folder)) is not None]
    for name in find_indexes(folder, manifest.generation):
        path = index_file(folder, generation_name(name, manifest.generation))
        problems += _index_problems(path, fingerprint)
    for name in find_sentences(folder, manifest.generation):
        problems += _sentences_problems(sentences_file(folder, generation_name(name, manifest.generation)), fingerprint)
    return problems


def _sentences_problems(path: Path, fingerprint: str) -> list[Problem]:
    try:
        report = SentencesReport.load(path)
    except DatastoreError as error:
        description = path.with_suffix(".json")
        return [Problem(description.name, str(error).removeprefix(f"{description} "))]
    if report.datastore_sha256 != fingerprint:
        return [Problem(path.with_suffix(".json").name, f"belongs to another datastore; {REMEDY}")]
    return [] if (what := report.problem(path)) is None else [Problem(path.name, what)]


def _index_problems(path: Path, fingerprint: str) -> list[Problem]:
    description = path.with_suffix(".json")
    if not description.is_file():
        return [Problem(description.name, f"is missing, so {path.name} is not whole; build the index again")]
    try:
        report = IndexReport.load(description)
    except DatastoreError as error:
        return [Problem(description.name, str(error).removeprefix(f"{description} "))]
    problems = []
    if report.datastore_sha256 != fingerprint:
        problems.append(Problem(description.name, "belongs to another datastore; build the index again"))
    for file, sha256 in report.checksums(path).items():
        if not file.is_file():
            problems.append(Problem(file.name, "is missing; build the index again"))
        elif file_sha256(file) != sha256:
            problems.append(Problem(file.name, "is damaged (its checksum is another); build the index again"))
    return problems
