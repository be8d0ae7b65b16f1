"""Names of the files of an index, beside the shards of its datastore."""

from pathlib import Path


def index_file(folder: Path, name: str) -> Path:
    """NAME.faiss: the whole index, or the trained one without entries if these are in parts."""
    return folder / f"{name}.faiss"


def description_file(folder: Path, name: str) -> Path:
    """NAME.json, without which an index is not whole."""
    return folder / f"{name}.json"


def part_file(folder: Path, name: str, number: int) -> Path:
    """NAME.part-00000.faiss: a part's entries, by its number from 0."""
    return folder / f"{name}.part-{number:05d}.faiss"


def is_index_name(name: str) -> bool:
    """Whether NAME.faiss or NAME.json belongs to an index; the names of parts and of what training left have dots."""
    return "." not in name
