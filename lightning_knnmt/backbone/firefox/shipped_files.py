"""The files of a translation direction as Firefox Translations and Bergamot ship them, told by their names."""

import gzip
import hashlib
import re
import zlib
from dataclasses import dataclass
from pathlib import Path

_LARGEST = 4 << 30  # bytes of a decompressed file
_KINDS = {
    "model": re.compile(r"model.*\.(bin|npz)(\.gz)?"),
    "vocabulary": re.compile(r"vocab.*\.spm(\.gz)?"),
    "source vocabulary": re.compile(r"srcvocab.*\.spm(\.gz)?"),
    "target vocabulary": re.compile(r"trgvocab.*\.spm(\.gz)?"),
    "shortlist": re.compile(r"lex.*\.bin(\.gz)?"),
}


@dataclass(frozen=True)
class ShippedFiles:
    """The files of one translation direction.

    Attributes:
        model: Marian's `.bin` or `.npz`.
        source_vocabulary: SentencePiece model of the source.
        target_vocabulary: That of the target; the same file where there is one vocabulary.
        shortlist: Binary lexical shortlist, if there is one.
    """

    model: Path
    source_vocabulary: Path
    target_vocabulary: Path
    shortlist: Path | None = None

    @classmethod
    def of(cls, folder: Path) -> "ShippedFiles":
        """The files of a folder, told by their names as Firefox gives them.

        Raises:
            ValueError: A file is missing, or there are several of a kind.
        """
        if not folder.is_dir():
            raise ValueError(f"folder is {folder}, which is no folder; expected one with a model and its vocabulary")
        found: dict[str, Path] = {}
        for kind, name in _KINDS.items():
            files = sorted(file for file in folder.iterdir() if name.fullmatch(file.name))
            if len(files) > 1:
                raise ValueError(f"{folder} has {', '.join(file.name for file in files)}, expected one {kind}")
            if files:
                found[kind] = files[0]
        source = found.get("source vocabulary", found.get("vocabulary"))
        target = found.get("target vocabulary", found.get("vocabulary"))
        if "model" not in found or source is None or target is None:
            raise ValueError(
                f"{folder} lacks a model or a vocabulary, expected model*.bin or model*.npz, "
                "and vocab*.spm or srcvocab*.spm with trgvocab*.spm, each perhaps with .gz"
            )
        return cls(found["model"], source, target, found.get("shortlist"))

    def checksums(self) -> dict[str, str]:
        """SHA-256 of each file, by its name."""
        files = {file for file in vars(self).values() if file is not None}
        sums = {}
        for file in sorted(files):
            with file.open("rb") as content:
                sums[file.name] = hashlib.file_digest(content, "sha256").hexdigest()
        return sums

    def decompressed(self, folder: Path) -> "ShippedFiles":
        """The files with those that end in .gz decompressed into a folder."""
        plain: dict[str, Path | None] = {}
        for kind, file in vars(self).items():
            plain[kind] = file
            if file is not None and file.suffix == ".gz":
                plain[kind] = target = folder / file.stem
                try:
                    with gzip.open(file) as source, target.open("wb") as content:
                        while piece := source.read(1 << 20):
                            content.write(piece)
                            if content.tell() > _LARGEST:
                                raise ValueError(f"{file} decompresses to more than {_LARGEST} bytes, expected fewer")
                except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                    raise ValueError(f"{file} is damaged or no gzip file: {error}") from error
        return ShippedFiles(**plain)  # type: ignore[arg-type]
