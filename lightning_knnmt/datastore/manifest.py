"""What a datastore is made of, and what it was made with."""

from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_knnmt.backbone.provenance import Provenance
from lightning_knnmt.checks import check_types
from lightning_knnmt.datastore.removed import RemovedInfo
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import file_problem, sync_folder
from lightning_knnmt.storage.layout import BUILDING, MANIFEST, shard_file, shard_number
from lightning_knnmt.storage.sealed import content_sha256, read_sealed, write_sealed

MOST_ENTRIES = 1 << 50
WRITTEN_IF_SET = (
    "generation",
    "appended",
    "removed",
    "pruned",
    "shard_entries",
    "shard_pairs",
)  # fields that a store which was never changed does not have


@dataclass(frozen=True)
class ShardInfo:
    """One HDF5 file of the datastore.

    Attributes:
        file: Its name in the datastore's folder.
        entries: Keys in it.
        pairs: Sentence pairs in it.
        sha256: Checksum of the file.
    """

    file: str
    entries: int
    pairs: int
    sha256: str

    def __post_init__(self) -> None:
        check_types(self)
        if Path(self.file).name != self.file or self.file == ".." or not self.file.endswith(".h5"):
            raise ValueError(f"it names the shard {self.file!r}, expected a file name NAME.h5 without folders")
        for name in ("entries", "pairs"):
            if not 0 <= getattr(self, name) <= MOST_ENTRIES:
                raise ValueError(f"{name} of {self.file} is {getattr(self, name)}, expected 0 to {MOST_ENTRIES}")

    def problem(self, folder: Path) -> str | None:
        """What is wrong with the file, in words that follow its name; None if every byte is as it was written."""
        return file_problem(folder / self.file, self.sha256, "build the datastore again")

    def is_whole(self, folder: Path) -> bool:
        """Whether every byte is as it was written."""
        return self.problem(folder) is None


def library_versions() -> dict[str, str]:
    """Versions of the libraries that a datastore depends on."""
    found = {}
    for package in ("torch", "transformers", "tokenizers", "h5py", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@dataclass(frozen=True)
class AppendedCorpus:
    """What was appended to a datastore after it was built.

    Attributes:
        corpus: File name of the corpus.
        corpus_sha256: Its checksum.
        first: The number that its first pair has, or would have, in the datastore.
        pairs: Pairs of it that were not stored before.
    """

    corpus: str
    corpus_sha256: str
    first: int
    pairs: int

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class PrunedInfo:
    """Which entries of another datastore this one does without, and why.

    Attributes:
        rule: Class of the rule that chose them.
        options: Its options.
        datastore_sha256: Fingerprint of the other datastore.
        removed_sha256: Checksum of its list of removed entries; None if nothing was removed from it.
        entries: Its entries, those that were removed not counted.
        dropped: How many entries were dropped, by reason.
        pairs: Pairs of which no entry is left, and which are gone with their texts.
    """

    rule: str
    options: dict[str, Any]
    datastore_sha256: str
    removed_sha256: str | None
    entries: int
    dropped: dict[str, int]
    pairs: int

    def __post_init__(self) -> None:
        check_types(self)

    @property
    def plan(self) -> tuple[Any, ...]:
        """What the rest follows from."""
        return self.rule, self.options, self.datastore_sha256, self.removed_sha256


@dataclass(frozen=True)
class Manifest:
    """What a datastore is: the contents of `manifest.json`, which is there only if the datastore is whole.

    Attributes:
        provenance: Model, tokenizer and key type.
        corpus: File name of the corpus.
        corpus_sha256: Its checksum.
        reading: How its pairs were read, as options of the readers.
        shard_entries: Most entries of a shard, in a store of an earlier version; otherwise None.
        shards: The shards, in order.
        encoding: What else the last bits of the keys depend on: batches, type and place of the weights.
        libraries: Versions at the time of building.
        generation: How often the shards were changed since; the files of indexes carry its number.
        appended: What was added by that.
        removed: Where it says which entries were removed and are still in the shards.
        pruned: How it came from a larger datastore, if it did; several times, the last one last.
        shard_pairs: Pairs of a shard, as asked for; the last one has fewer.
    """

    provenance: Provenance
    corpus: str
    corpus_sha256: str
    reading: dict[str, Any]
    shard_entries: int | None
    shards: tuple[ShardInfo, ...]
    encoding: dict[str, Any] = field(default_factory=dict)
    libraries: dict[str, str] = field(default_factory=library_versions)
    generation: int = 0
    appended: tuple[AppendedCorpus, ...] = ()
    removed: RemovedInfo | None = None
    pruned: tuple[PrunedInfo, ...] = ()
    shard_pairs: int | None = None

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 <= self.generation <= MOST_ENTRIES:
            raise ValueError(f"generation is {self.generation}, expected 0 to {MOST_ENTRIES}")
        files = [shard.file for shard in self.shards]
        if len(set(files)) < len(files):
            raise ValueError(f"it names {max(files, key=files.count)} more than once")

    @property
    def entries(self) -> int:
        """Entries of all shards."""
        return sum(shard.entries for shard in self.shards)

    @property
    def pairs(self) -> int:
        """Sentence pairs of all shards."""
        return sum(shard.pairs for shard in self.shards)

    @property
    def pairs_of_a_shard(self) -> int:
        """Most pairs of a shard."""
        return self.shard_pairs or max((shard.pairs for shard in self.shards), default=1)

    @property
    def is_changed(self) -> bool:
        """Whether pairs were appended or removed since the datastore was built."""
        return self.generation > 0 or self.removed is not None

    def next_shard(self, number: int = 0) -> str:
        """File name of the shard that comes so many places after the next one; no shard has it yet."""
        taken = (shard_number(shard.file) for shard in self.shards)
        return shard_file(max((each for each in taken if each is not None), default=-1) + 1 + number)

    def with_shard(self, shard: ShardInfo) -> "Manifest":
        """The manifest of a datastore with one more shard."""
        return replace(self, shards=(*self.shards, shard))

    def save(self, folder: Path, name: str = MANIFEST) -> None:
        """Write the manifest, whole or not at all.

        Raises:
            DatastoreError: It could not be written.
        """
        fields = asdict(self).items()
        write_sealed(folder / name, {key: value for key, value in fields if value or key not in WRITTEN_IF_SET})

    @classmethod
    def load(cls, folder: Path, name: str = MANIFEST) -> "Manifest":
        """Read a datastore's manifest.

        Raises:
            DatastoreError: There is none, or it is not one that this version can read.
        """
        return read_manifest(folder, name)[0]


def read_manifest(folder: Path, name: str = MANIFEST) -> tuple[Manifest, str]:
    """A manifest, and its SHA-256 but for what was removed: removing changes neither shards nor indexes.

    Raises:
        DatastoreError: There is none, or it is not one that this version can read.
    """
    path = folder / name
    if not path.exists():
        begun = " holds an unfinished datastore" if (folder / BUILDING).exists() else " holds no datastore"
        raise DatastoreError(f"{folder}{begun} ({name} is missing); build it with build_index.py")
    try:
        content = read_sealed(path)
        removed = content.pop("removed", None)
        fingerprint = content_sha256(content)
        content.setdefault("shard_entries", None)
        content["provenance"] = Provenance(**content["provenance"])
        content["shards"] = tuple(ShardInfo(**shard) for shard in content["shards"])
        content["appended"] = tuple(AppendedCorpus(**corpus) for corpus in content.get("appended", ()))
        content["pruned"] = tuple(PrunedInfo(**info) for info in content.get("pruned", ()))
        content["removed"] = None if removed is None else RemovedInfo(**removed)
        return Manifest(**content), fingerprint
    except (ValueError, KeyError, TypeError) as error:
        raise DatastoreError(f"{path} is damaged ({error}); build the datastore again") from error


def finish_building(folder: Path) -> None:
    """Say that the datastore is whole."""
    (folder / BUILDING).replace(folder / MANIFEST)
    sync_folder(folder)
