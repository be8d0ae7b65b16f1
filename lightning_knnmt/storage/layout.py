"""Names of the files of an index, beside the shards of its datastore.

NAME is what the index is called, and from the first change of the datastore on NAME.1, NAME.2 and so on: a change
writes indexes of its own beside those in use, and all of them come into force with the manifest.
"""

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_FILE = re.compile(r"([^.]+)(?:\.(\d+))?(\.part-\d{5,}|\.trained)?\.(faiss|json)(\.partial)?")


def generation_name(name: str, generation: int) -> str:
    """NAME, or NAME.3 after the third change."""
    return f"{name}.{generation}" if generation else name


def index_file(folder: Path, name: str) -> Path:
    """NAME.faiss: the whole index, or the trained one without entries if these are in parts."""
    return folder / f"{name}.faiss"


def description_file(folder: Path, name: str) -> Path:
    """NAME.json, without which an index is not whole."""
    return folder / f"{name}.json"


def part_file(folder: Path, name: str, number: int) -> Path:
    """NAME.part-00000.faiss: a part's entries, by its number from 0."""
    return folder / f"{name}.part-{number:05d}.faiss"


def find_indexes(folder: Path, generation: int) -> list[str]:
    """Names of the indexes of a generation, in whatever state; what a build has left is no index yet."""
    return sorted({name for _, name, found, is_index in _files(folder) if found == generation and is_index})


def remove_other_indexes(folder: Path, generation: int) -> None:
    """Remove the files of all generations but one."""
    for path, _, found, _ in list(_files(folder)):
        if found != generation:
            with suppress(PermissionError):  # Windows keeps what is open; the next change tries again
                path.unlink()


def _files(folder: Path) -> Iterator[tuple[Path, str, int, bool]]:
    """Path, name, generation, and whether it is an index's own file, of all files that belong to indexes."""
    for path in folder.iterdir():
        if (found := _FILE.fullmatch(path.name)) is None:
            continue
        name, generation, left, suffix, partial = found.groups()
        if suffix == "faiss" or left or b'"faiss_sha256":' in path.read_bytes():  # or it is a file of the user's
            yield path, name, int(generation or 0), not (left or partial)
