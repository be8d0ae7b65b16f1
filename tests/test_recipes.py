"""Corpora from package registries: what is read from the packages, and what a failure says. Nothing is downloaded."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import polib
import pytest

from lightning_knnmt.data import recipes
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, MalformedCorpusError, ReadReport
from lightning_knnmt.data.recipes import (
    Corpus,
    FetchError,
    LibreOfficeHelp,
    ParallelFiles,
    PretixCatalogs,
)

GERMAN = PretixCatalogs("de", "en")
WHEEL = "pretix-2026.8.0-py3-none-any.whl"
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="needs dpkg-deb, which this machine lacks")


def read(corpus: Corpus, cache: Path) -> tuple[list[Pair], dict[str, int]]:
    report = ReadReport()
    pairs = list(corpus.pairs(cache, report))
    assert report.read == len(pairs)
    return pairs, dict(report.skipped)


def catalog(folder: Path, *translations: tuple[str, str]) -> bytes:
    """A .mo file with (German, English) texts."""
    entries = polib.POFile()
    entries.metadata = {"Content-Type": "text/plain; charset=UTF-8"}
    for german, english in translations:
        entries.append(polib.POEntry(msgid=english, msgstr=german))
    entries.save_as_mofile(str(folder / "catalog.mo"))
    return (folder / "catalog.mo").read_bytes()


def wheel(file: Path, members: dict[str, bytes]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file


def debian_package(folder: Path, package: str, members: dict[str, bytes]) -> Path:
    root = folder / f"{package}-tree"
    for name, content in {"DEBIAN/control": control(package), **members}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
    cache = folder / "cache"
    cache.mkdir(exist_ok=True)
    deb = cache / f"{package}_1.0-1_all.deb"
    subprocess.run(["dpkg-deb", "--root-owner-group", "--build", str(root), str(deb)], check=True, capture_output=True)
    shutil.rmtree(root)
    return deb


def control(package: str) -> bytes:
    fields = (
        f"Package: {package}\nVersion: 1.0-1\nArchitecture: all\nMaintainer: T <t@example.org>\nDescription: test\n"
    )
    return fields.encode()


def program(folder: Path, name: str, script: str) -> Path:
    """An executable shell script that stands in for pip or apt-get."""
    folder.mkdir(exist_ok=True)
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


# ---- pretix


def test_pretix_reads_the_german_catalogs_of_the_wheel_only(tmp_path: Path) -> None:
    files = {
        "pretix/locale/de/LC_MESSAGES/djangojs.mo": catalog(tmp_path, ("Abbrechen", "Cancel")),
        "pretix/locale/de/LC_MESSAGES/django.mo": catalog(tmp_path, ("Bestellung", "Order"), ("Sitzplan", "Seats")),
        "pretix/locale/de_Informal/LC_MESSAGES/django.mo": catalog(tmp_path, ("Deine Bestellung", "Your order")),
        "pretix/locale/fr/LC_MESSAGES/django.mo": catalog(tmp_path, ("Commande", "Order")),
        "pretix/locale/de/LC_MESSAGES/django.po": b"no catalog",
    }
    wheel(tmp_path / WHEEL, files)
    pairs, skipped = read(GERMAN, tmp_path)
    assert pairs == [Pair("Bestellung", "Order"), Pair("Sitzplan", "Seats"), Pair("Abbrechen", "Cancel")]
    assert skipped == {}


def test_pretix_downloads_a_wheel_for_any_platform_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = wheel(tmp_path / WHEEL, {"a/locale/de/LC_MESSAGES/a.mo": catalog(tmp_path, ("Karte", "ticket"))})
    script = f'echo "$@" >> {tmp_path}/calls; cp {source} .'
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "bin", "python", script)))
    cache = tmp_path / "new" / "cache"
    for _ in range(2):
        assert read(GERMAN, cache) == ([Pair("Karte", "ticket")], {})
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("-m pip download ")
    assert "--no-deps --only-binary :all: --ignore-requires-python pretix==2026.8.0" in call
    assert [file.name for file in cache.iterdir()] == [WHEEL]


@pytest.mark.parametrize("stream", [1, 2])
def test_a_failing_download_repeats_the_words_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stream: int
) -> None:
    script = f"touch half.whl; echo 'ERROR: No matching distribution found' >&{stream}; exit 3"
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "bin", "python", script)))
    cache = tmp_path / "cache"
    message = "(?s)could not download pretix==7: `.*pip download .*` said\nERROR: No matching distribution found"
    with pytest.raises(FetchError, match=message):
        read(PretixCatalogs("de", "en", "7"), cache)
    assert list(cache.iterdir()) == []


def test_a_download_of_something_else_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(program(tmp_path / "bin", "python", "touch pretix-7-cp311-linux.whl")))
    with pytest.raises(FetchError, match=r"pretix==7 was downloaded .* but gave no pretix-7-py3-none-any\.whl"):
        read(PretixCatalogs("de", "en", "7"), tmp_path / "cache")


def test_an_interrupted_download_leaves_nothing_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def interrupt(command: list[str], cwd: str, **_: Any) -> None:
        started.append(command)
        Path(cwd, WHEEL).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupt)
    with pytest.raises(KeyboardInterrupt):
        read(GERMAN, tmp_path / "cache")
    assert len(started) == 1
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_wheel_is_named_with_what_to_do(tmp_path: Path, share: float) -> None:
    file = wheel(tmp_path / WHEEL, {"a/locale/de/LC_MESSAGES/a.mo": catalog(tmp_path, ("Karte", "ticket"))})
    file.write_bytes(file.read_bytes()[: int(share * file.stat().st_size)])
    with pytest.raises(FetchError, match=rf"{WHEEL} is damaged or incomplete, delete it and run .* said\n."):
        read(GERMAN, tmp_path)


def test_a_wheel_with_changed_content_is_named(tmp_path: Path) -> None:
    content = os.urandom(2000)
    file = wheel(tmp_path / WHEEL, {"a/locale/de/LC_MESSAGES/a.mo": content})
    data = bytearray(file.read_bytes())
    data[1000] ^= 255
    file.write_bytes(data)
    with pytest.raises(FetchError, match=rf"{WHEEL} is damaged or incomplete"):
        read(GERMAN, tmp_path)


def test_a_broken_catalog_is_named_with_its_package(tmp_path: Path) -> None:
    wheel(tmp_path / WHEEL, {"a/locale/de/LC_MESSAGES/a.mo": b"no catalog"})
    message = rf"a/locale/de/LC_MESSAGES/a\.mo in .*{WHEEL}: .*not a readable gettext \.mo file"
    with pytest.raises(MalformedCorpusError, match=message):
        read(GERMAN, tmp_path)


# ---- Debian packages

PAGE = "usr/share/help/text/a.html"


def pages(package: str, cache: Path) -> dict[str, bytes]:
    """The help pages of a Debian package."""
    return LibreOfficeHelp._pages(package, cache)


def page(*paragraphs: str) -> bytes:
    return f'<html><body><h1 id="hd_1">Titel</h1>{"".join(paragraphs)}</body></html>'.encode()


@needs_dpkg
def test_help_pages_align_by_page_and_paragraph_id_and_the_rest_is_counted(tmp_path: Path) -> None:
    german = {
        "a/x.html": page(
            '<p id="par_2">Größe\n <b>ändern</b></p>',
            '<p id="par_1">Erster</p>',
            '<p id="other_1">kein Absatz</p>',
            "<p>ohne Nummer</p>",
            '<p id="par_3"> </p>',
            '<p id="par_de">nur deutsch</p>',
            '<h4 id="par_4">zuerst</h4><p id="par_4">zuletzt</p>',
        ),
        "b/x.html": page('<p id="par_1">Anderer</p>'),
        "b/nur_deutsch.html": page(),
        "leer.html": b"",
    }
    english = {
        "a/x.html": page(
            '<p id="par_1">First</p>',
            '<p id="par_2">Resize</p>',
            '<p id="par_3">empty in German</p>',
            '<h4 id="par_4">first</h4><p id="par_4">last</p>',
            '<div id="par_div">no paragraph</div>',
        ),
        "b/x.html": page('<p id="par_1">Another</p>', '<p id="par_9">English only</p>'),
        "leer.html": b"\n",
    }
    for code, pages in (("de", german), ("en-us", english)):
        members = {f"usr/share/libreoffice/help/{code}/text/{name}": content for name, content in pages.items()}
        debian_package(tmp_path, f"libreoffice-help-{code}", members)
    pairs, skipped = read(LibreOfficeHelp("de", "en-us"), tmp_path / "cache")
    assert pairs == [
        Pair("Titel", "Titel", "a/x.html"),
        Pair("Größe ändern", "Resize", "a/x.html"),
        Pair("Erster", "First", "a/x.html"),
        Pair("zuletzt", "last", "a/x.html"),
        Pair("Titel", "Titel", "b/x.html"),
        Pair("Anderer", "Another", "b/x.html"),
    ]
    # one paragraph in German only, one in English only, and the title of the German page
    assert skipped == {"empty side": 1, "repeated paragraph id": 1, "paragraph in one language only": 3}


@needs_dpkg
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.99])
def test_a_truncated_debian_package_is_named_with_what_to_do(tmp_path: Path, share: float) -> None:
    noise = os.urandom(300_000)
    deb = debian_package(tmp_path, "gimp", {PAGE: page(), "usr/share/x": noise})
    assert len(pages("gimp", deb.parent)) == 1
    deb.write_bytes(deb.read_bytes()[: int(share * deb.stat().st_size)])
    with pytest.raises(
        FetchError, match=r"gimp_1\.0-1_all\.deb is damaged or incomplete, delete it and run .* said\n."
    ):
        pages("gimp", deb.parent)


@needs_dpkg
def test_reading_may_stop_in_the_middle_of_a_package(tmp_path: Path) -> None:
    noise = {f"usr/share/z{number}": os.urandom(500_000) for number in range(3)}
    deb = debian_package(tmp_path, "gimp", {PAGE: page(), **noise})
    members = recipes._debian_members(deb, re.compile("html$"))
    assert next(members)[1] == page()
    members.close()  # type: ignore[attr-defined]


def without_programs(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PATH", str(folder))


def test_a_machine_without_apt_get_is_told_what_else_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_programs(monkeypatch, tmp_path / "bin")
    message = r"gimp is a Debian package and this machine has no apt-get; place gimp_\*\.deb into .*cache or choose"
    with pytest.raises(FetchError, match=message):
        pages("gimp", tmp_path / "cache")


def test_a_machine_without_dpkg_is_told_to_install_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gimp_1_all.deb").write_bytes(b"some package")
    without_programs(monkeypatch, tmp_path / "bin")
    with pytest.raises(
        FetchError, match=r"gimp_1_all\.deb is a Debian package .* no dpkg-deb to read it; install dpkg"
    ):
        pages("gimp", tmp_path)


def test_a_failing_apt_get_repeats_its_words_and_mentions_the_lists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(tmp_path / "bin", "apt-get", "echo 'E: Unable to locate package gimp' >&2; exit 100")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    message = "(?s)could not download gimp .*run `apt-get update` as root once.*said\nE: Unable to locate package gimp"
    with pytest.raises(FetchError, match=message):
        pages("gimp", tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("script", "found"), [("exit 0", "no such file"), ("touch gimp_1_all.deb gimp_2_all.deb", "gimp_1.*, gimp_2")]
)
def test_anything_but_one_file_of_a_package_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, found: str
) -> None:
    program(tmp_path / "bin", "apt-get", script)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(FetchError, match=rf"expected one file gimp_\*\.deb in .*, found {found}.*; keep the version"):
        pages("gimp", tmp_path / "cache")


@needs_dpkg
def test_a_debian_package_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deb = debian_package(tmp_path, "gimp", {PAGE: page()})
    source = deb.rename(tmp_path / "gimp_1%3a1.0-1_all.deb")
    program(tmp_path / "bin", "apt-get", f'echo "$@" >> {tmp_path}/calls; cp {source} .')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    for _ in range(2):
        assert list(pages("gimp", tmp_path / "cache").values()) == [page()]
    assert (tmp_path / "calls").read_text().splitlines() == ["download -q gimp"]
    assert [file.name for file in (tmp_path / "cache").iterdir()] == [source.name]


def test_pretix_is_between_english_and_another_language() -> None:
    for languages in (("en", "en"), ("de", "pt_BR")):
        with pytest.raises(ValueError, match="expected 'en' for one of them"):
            PretixCatalogs(*languages)


def test_pretix_from_english(tmp_path: Path) -> None:
    wheel(tmp_path / WHEEL, {"a/locale/pt_BR/LC_MESSAGES/a.mo": catalog(tmp_path, ("Pedido", "Order"))})
    assert read(PretixCatalogs(), tmp_path) == ([Pair("Order", "Pedido")], {})


# ---- the user's own files


def test_no_files_are_refused() -> None:
    with pytest.raises(ValueError, match="files is empty, expected one file or more"):
        ParallelFiles([])


def test_own_files_come_one_after_the_other_with_one_report(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("eins\tone\n\tempty\n")
    (tmp_path / "b.de").write_text("zwei\n\ndrei\n")
    (tmp_path / "b.en").write_text("two\n\nthree\n")
    files = [CorpusFile(tmp_path / "a.tsv", malformed="skip")]
    files.append(CorpusFile(tmp_path / "b.de", tmp_path / "b.en", malformed="skip"))
    cache = tmp_path / "cache"
    pairs, skipped = read(ParallelFiles(files), cache)
    assert pairs == [Pair("eins", "one"), Pair("zwei", "two"), Pair("drei", "three")]
    assert skipped == {"empty side": 2}
    assert not cache.exists()
