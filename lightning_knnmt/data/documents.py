"""Documents of a language model: each a pair of its text and an empty target, cut into windows after the split."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import MalformedCorpusError, ReadReport
from lightning_knnmt.data.recipes import LibreOfficeHelp


class HelpPages:
    """The English help pages of LibreOffice as documents, one paragraph a line, from a Debian package.

    Args:
        pages: How many pages are drawn; None: all.
        min_characters: Shorter pages are left out.
        seed: Seed of the draw.
    """

    def __init__(self, pages: int | None = None, min_characters: int = 200, seed: int = 1) -> None:
        check_at_least(1, pages=pages)
        self.pages, self.min_characters, self.seed = pages, min_characters, seed

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield each page as a source without target; the document is the page."""
        texts = {}
        for page, content in sorted(LibreOfficeHelp._pages("libreoffice-help-en-us", cache).items()):
            paragraphs = LibreOfficeHelp._paragraphs(content).values()
            text = "\n".join(found[-1] for found in paragraphs if found[-1])
            if len(text) < self.min_characters:
                report.skipped["page under min_characters"] += 1
            else:
                texts[page] = text
        drawn = sorted(random.Random(self.seed).sample(sorted(texts), min(len(texts), self.pages or len(texts))))
        report.skipped["page not drawn"] += len(texts) - len(drawn)
        for page in drawn:
            report.read += 1
            yield Pair(texts[page], "", page)


class Documents:
    """The user's own documents in one language.

    Args:
        files: Text files, each of which is a document, and JSONL files with a document's `text` and its name, under
            `document`, on every line.
    """

    def __init__(self, files: list[Path]) -> None:
        if not files:
            raise ValueError("files is empty, expected one file or more")
        self.files = files

    def pairs(self, cache: Path, report: ReadReport) -> Iterator[Pair]:
        """Yield each document as a source without target."""
        for file in self.files:
            for name, text in self._read(file):
                if text.strip():
                    report.read += 1
                    yield Pair(text.strip(), "", name)
                else:
                    report.skipped["empty document"] += 1

    @staticmethod
    def _read(file: Path) -> Iterator[tuple[str, str]]:
        if file.suffix != ".jsonl":
            yield str(file), file.read_text(encoding="utf-8-sig")
            return
        with file.open(encoding="utf-8-sig") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    record = json.loads(line)
                    yield str(record.get("document") or f"{file}:{number}"), record["text"].replace("\0", "")
                except (AttributeError, KeyError, TypeError, ValueError) as error:
                    raise MalformedCorpusError(
                        f"{file}:{number}: found {line.strip()[:60]!r}, expected an object with a document's text"
                    ) from error
