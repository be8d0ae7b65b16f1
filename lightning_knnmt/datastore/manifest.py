"""What a datastore is made of, and what it was made with."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_knnmt.backbone import Backbone

FORMAT = 1
FILE_NAME = "manifest.json"


class DatastoreError(RuntimeError):
    """A datastore is missing, damaged, or does not fit what it is used with."""


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


@dataclass(frozen=True)
class Provenance:
    """What decides which keys and values a corpus gets.

    Attributes:
        model: Name or folder of the model.
        model_sha256: Fingerprint of its weights.
        tokenizer_sha256: Fingerprint of its tokenizer.
        key_type: Where the keys were read.
        key_size: D.
        src_lang: Language code of the source, if the model needs one.
        tgt_lang: Language code of the target, if the model needs one.
    """

    model: str
    model_sha256: str
    tokenizer_sha256: str
    key_type: str
    key_size: int
    src_lang: str | None
    tgt_lang: str | None

    @classmethod
    def of(cls, backbone: Backbone) -> "Provenance":
        """What keys made by this backbone come from."""
        return cls(
            model=backbone.name,
            model_sha256=backbone.model_fingerprint,
            tokenizer_sha256=backbone.tokenizer_fingerprint,
            key_type=backbone.key_type,
            key_size=backbone.key_size,
            src_lang=backbone.src_lang,
            tgt_lang=backbone.tgt_lang,
        )

    def differences(self, other: "Provenance") -> list[str]:
        """In words, what makes the keys of two provenances incomparable; the model's name alone does not."""
        found = []
        if self.model_sha256 != other.model_sha256:
            found.append(f"model {_model(self)} against {_model(other)}")
        for name in ("tokenizer_sha256", "key_type", "key_size", "src_lang", "tgt_lang"):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours != theirs:
                label = name.removesuffix("_sha256")
                found.append(f"{label} {str(ours)[:16]} against {str(theirs)[:16]}")
        return found


def _model(provenance: Provenance) -> str:
    return f"{provenance.model} ({provenance.model_sha256[:12]})"


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
class Manifest:
    """The contents of `manifest.json`; it is written last, so a datastore that has one is whole.

    Attributes:
        provenance: Model, tokenizer and key type.
        corpus: File name of the corpus.
        corpus_sha256: Its checksum.
        reading: How its pairs were read, as options of the readers.
        shard_entries: Most entries of a shard, as asked for.
        shards: The shards, in order.
        libraries: Versions at the time of building.
        format: Version of the layout.
    """

    provenance: Provenance
    corpus: str
    corpus_sha256: str
    reading: dict[str, Any]
    shard_entries: int
    shards: tuple[ShardInfo, ...]
    libraries: dict[str, str] = field(default_factory=library_versions)
    format: int = FORMAT

    @property
    def entries(self) -> int:
        """Entries of all shards."""
        return sum(shard.entries for shard in self.shards)

    @property
    def pairs(self) -> int:
        """Sentence pairs of all shards."""
        return sum(shard.pairs for shard in self.shards)

    def save(self, folder: Path) -> None:
        """Write the manifest beside its final place and rename it."""
        beside = folder / (FILE_NAME + ".partial")
        beside.write_text(json.dumps(asdict(self), indent=2) + "\n", encoding="utf-8")
        beside.replace(folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read a datastore's manifest.

        Raises:
            DatastoreError: There is none, or it is not one that this version can read.
        """
        path = folder / FILE_NAME
        if not path.exists():
            raise DatastoreError(f"{folder} holds no datastore ({FILE_NAME} is missing); build it with build_index.py")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != FORMAT:
                raise DatastoreError(f"{path} has format {content['format']}, expected {FORMAT}; build it again")
            content["provenance"] = Provenance(**content["provenance"])
            content["shards"] = tuple(ShardInfo(**shard) for shard in content["shards"])
            for shard in content["shards"]:
                if Path(shard.file).name != shard.file or shard.file == "..":
                    raise DatastoreError(f"{path} names the shard {shard.file!r}, expected a file name without folders")
            return cls(**content)
        except (ValueError, KeyError, TypeError) as error:
            raise DatastoreError(f"{path} is damaged ({error}); build the datastore again") from error


def file_sha256(path: Path) -> str:
    """Checksum of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
