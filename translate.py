"""Translate text, one sentence a line: ``python translate.py --config runs/demo/translate.yaml < in.txt > out.txt``."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.cli import run_script
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain as explain_translation
from lightning_knnmt.evaluation.explanation import explanation_lines
from lightning_knnmt.index.config import Device
from lightning_knnmt.index.memory import KnnSearch, KnnSettings, open_search


def translate(
    backbone: KeyedModel,
    datastore: Path | None = None,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    decoding: Decoding = Decoding(),
    input: str = "-",
    output: str = "-",
    block: int = 1024,
    explain: int = 0,
    index_device: Device = "cpu",
) -> None:
    """Translate UTF-8 text, one sentence a line, with the neighbors of a datastore or with the plain model.

    Args:
        backbone: The model, such as --backbone.model models/demo-de-en; --backbone.help lists its other options.
        datastore: Folder of a datastore built from that model; None: the plain model.
        index: Name of the datastore's index.
        knn: Settings of the search.
        decoding: Beam size, batch size and length.
        input: A text file; `-`: standard input.
        output: Where the translations go; `-`: standard output.
        block: Lines that are read, and batched by length, before the first is written; a line typed on a terminal is
            answered at once.
        explain: Print, for each produced token, this many of its nearest stored contexts; 0: translations only.
        index_device: Where the index is searched: `cpu`; `gpu`: divided between all GPUs; `auto`: there if FAISS can.
    """
    if block < 1:
        raise ValueError(f"block is {block}, expected 1 or more")
    if explain < 0:
        raise ValueError(f"explain is {explain}, expected 0 or more")
    if explain and datastore is None:
        raise ValueError(f"explain is {explain}, which shows stored contexts, but no datastore is given; give one too")
    if "-" not in (input, output) and Path(output).exists() and Path(output).samefile(input):
        raise ValueError(f"output is {output}, the same file as input; give another")
    with ExitStack() as stack:
        search = None
        if datastore is not None:
            search = stack.enter_context(open_search(backbone, datastore, index, device=index_device))
        translator = Translator(backbone, decoding) if search is None else search.translator(knn, decoding)
        source: BinaryIO = sys.stdin.buffer if input == "-" else stack.enter_context(Path(input).open("rb"))
        out: BinaryIO = sys.stdout.buffer if output == "-" else stack.enter_context(Path(output).open("wb"))
        lines = decoded(source, "standard input" if input == "-" else input)
        while rows := list(itertools.islice(lines, 1 if source.isatty() else block)):
            translated = (
                _translated(rows, translator) if not explain else _explained(rows, search, knn, decoding, explain)
            )
            for line in translated:
                out.write(line.encode() + b"\n")
            out.flush()


def decoded(lines: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of a UTF-8 text without their ends.

    Args:
        lines: Lines that end in a line feed, or in a carriage return and a line feed.
        name: What an error calls the text.

    Raises:
        ValueError: A line is not UTF-8.
    """
    for number, line in enumerate(lines, start=1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}, line {number}: byte {error.start + 1} is 0x{line[error.start]:02x}, expected UTF-8; "
                "convert the text first, such as by `iconv -f latin1 -t utf8`"
            ) from error


def _translated(rows: list[str], translator: Translator) -> Iterator[str]:
    """One line for each row; an empty row stays an empty line."""
    numbers = [number for number, row in enumerate(rows) if row.strip()]
    texts = dict(zip(numbers, translator.translate([rows[number] for number in numbers]).texts, strict=True))
    for number in range(len(rows)):
        yield _one_line(texts.get(number, ""))


def _explained(
    rows: list[str], search: KnnSearch | None, knn: KnnSettings, decoding: Decoding, shown: int
) -> Iterator[str]:
    """Each translation with the contexts behind its tokens, indented; an empty row stays an empty line."""
    assert search is not None
    for row in rows:
        if row.strip():
            explanation = explain_translation(search, knn, decoding, row, shown)
            yield _one_line(explanation.text)
            yield from map(_one_line, explanation_lines(explanation))
        else:
            yield ""


def _one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


if __name__ == "__main__":
    run_script(translate)
