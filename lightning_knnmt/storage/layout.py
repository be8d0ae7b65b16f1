"""Names of all files in a datastore's folder, and which of them belong to a manifest.

NAME is what an index is called, and from the first change of the datastore on NAME.1, NAME.2 and so on: a change writes
indexes of its own beside those in use, and all of them come into force with the manifest.

    manifest.json                        what the datastore is; there only if it is whole
    building.json                        the manifest of a build or change that is under way
    build.json                           time and memory that building took
    shard-00000.h5                       keys, values and sentences
    removed-1.json                       which entries were removed
    NAME.faiss, NAME.json                an index, or what was trained of one in parts, and its description
    NAME.part-00000.faiss                a part's entries; with a description of its own until all parts are there
    NAME.trained.faiss, .trained.json    what was trained, while entries are added
    NAME.sentences.safetensors, .json    a sentence index: which stored sentences are like a text, and its description
    writer.lock                          held by whoever writes
    *.partial                            a file that is being written
"""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

MANIFEST = "manifest.json"
BUILDING = "building.json"
BUILD_RECORD = "build.json"
LOCK = "writer.lock"
PARTIAL = ".partial"

RESERVED = tuple(Path(name).stem for name in (MANIFEST, BUILDING, BUILD_RECORD))  # no names of indexes

_SHARD = re.compile(r"shard-(\d+)\.h5")
_REMOVED = re.compile(r"removed-(\d+)\.json")
_INDEX = re.compile(
    r"(?P<name>[^.]+)(\.(?P<generation>\d+))?(\.part-(?P<part>\d{5,})|\.(?P<trained>trained))?\.(?P<suffix>faiss|json)"
)

_SENTENCES = re.compile(r"(?P<name>[^.]+)(\.(?P<generation>\d+))?\.sentences\.(safetensors|json)")


def shard_file(number: int) -> str:
    """File name of a shard by its number, from 0."""
    return f"shard-{number:05d}.h5"


def shard_number(file: str) -> int | None:
    """The number of a shard by its file name; None if it is called otherwise."""
    found = _SHARD.fullmatch(file)
    return None if found is None else int(found[1])


def removed_file(number: int) -> str:
    """File name of a list of removed entries by its number, from 1."""
    return f"removed-{number}.json"


def removed_number(file: str) -> int | None:
    """The number of a list of removed entries by its file name; None if it is called otherwise."""
    found = _REMOVED.fullmatch(file)
    return None if found is None else int(found[1])


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


def trained_file(folder: Path, name: str) -> Path:
    """NAME.trained.faiss: what was trained, while entries are added."""
    return folder / f"{name}.trained.faiss"


def sentences_file(folder: Path, name: str) -> Path:
    """NAME.sentences.safetensors: a sentence index, with NAME.sentences.json beside it."""
    return folder / f"{name}.sentences.safetensors"


def find_sentences(folder: Path, generation: int) -> list[str]:
    """Names of the sentence indexes of a generation, in whatever state."""
    names = (_SENTENCES.fullmatch(path.name) for path in folder.iterdir())
    return sorted({found["name"] for found in names if found and int(found["generation"] or 0) == generation})


def find_indexes(folder: Path, generation: int) -> list[str]:
    """Names of the indexes of a generation, in whatever state; what a build has left is no index yet."""
    files = ((path, _index_parts(path.name)) for path in folder.iterdir())
    whole = [(path, found) for path, found in files if found and not found["part"] and not found["trained"]]
    return sorted({
        found["name"] for path, found in whole if int(found["generation"] or 0) == generation and _is_of_index(path)
    })  # fmt: skip


def remove_others(
    folder: Path, shards: Collection[str], removed: Collection[str] = (), generations: Collection[int] = (0,)
) -> None:
    """Remove what does not belong to a datastore; files of the user's stay.

    Args:
        folder: The datastore's, to which nobody else writes.
        shards: File names of its shards.
        removed: File names of its lists of removed entries.
        generations: Whose indexes stay.
    """
    for path in list(folder.iterdir()):
        name = path.name.removesuffix(PARTIAL)
        if _SHARD.fullmatch(name):
            belongs = path.name in shards
        elif _REMOVED.fullmatch(name):
            belongs = path.name in removed
        elif found_sentences := _SENTENCES.fullmatch(name):
            belongs = int(found_sentences["generation"] or 0) in generations
        elif found := _index_parts(name):
            belongs = int(found["generation"] or 0) in generations or not _is_of_index(path)
        else:
            continue
        if not belongs:
            with suppress(PermissionError):  # Windows keeps what is open; the next change tries again
                path.unlink()


def remove_unfinished(folder: Path, name: str, parts: int) -> None:
    """Remove what building an index has left beside it.

    Args:
        folder: The datastore's.
        name: NAME, with the generation.
        parts: How many parts the finished index has; their descriptions go, too, since the index has its own.
    """
    for path in list(folder.iterdir()):
        found = _index_parts(path.name.removesuffix(PARTIAL))
        if found is None or generation_name(found["name"], int(found["generation"] or 0)) != name:
            continue
        of_finished = found["part"] and int(found["part"]) < parts and path.suffix == ".faiss"
        if (found["part"] or found["trained"]) and not of_finished:
            path.unlink()


def _index_parts(file: str) -> dict[str, str] | None:
    """What the name of an index's file says: name, generation, part, trained and suffix."""
    found = _INDEX.fullmatch(file)
    if found is None or found["name"] in RESERVED or _REMOVED.fullmatch(file):
        return None
    return found.groupdict()


def _is_of_index(path: Path) -> bool:
    """Whether a file with the name of an index's file is one: a JSON file may be the user's."""
    if path.suffix in (".faiss", PARTIAL):
        return True
    with suppress(FileNotFoundError):  # another process has just removed it
        return b'"faiss_sha256":' in path.read_bytes()
    return False
