"""Translate text, one sentence a line: ``python translate.py --config runs/demo/translate.yaml < in.txt > out.txt``."""

import itertools
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from lightning_knnmt import explanation
from lightning_knnmt.backbone import Backbone
from lightning_knnmt.cli import run_script
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.search import KnnSearch, KnnSettings, open_search

BLOCK = 1024  # sentences that are read, and sorted by length, before the first is written


def translate(
    backbone: Backbone,
    datastore: Path | None = None,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    decoding: Decoding = Decoding(),
    input: str = "-",
    output: str = "-",
    explain: int = 0,
) -> None:
    """Translate text, one sentence a line.

    Args:
        backbone: The model.
        datastore: Folder of a datastore built from that model; None: the plain model.
        index: Name of the datastore's index.
        knn: Settings of the search.
        decoding: Beam size, batch size and length.
        input: A UTF-8 text file; `-`: standard input.
        output: Where the translations go; `-`: standard output.
        explain: Print, for each produced token, this many of its nearest stored contexts.
    """
    if explain and datastore is None:
        raise ValueError("explain shows stored contexts, expected a datastore too")
    with ExitStack() as stack:
        search = None if datastore is None else stack.enter_context(open_search(backbone, datastore, index))
        translator = Translator(backbone, decoding) if search is None else search.translator(knn, decoding)
        lines = sys.stdin if input == "-" else stack.enter_context(Path(input).open(encoding="utf-8", newline="\n"))
        out = sys.stdout if output == "-" else stack.enter_context(Path(output).open("w", encoding="utf-8"))
        while block := [line.rstrip("\r\n") for line in itertools.islice(lines, BLOCK)]:
            for line in _translated(block, translator, search, knn, explain):
                out.write(line + "\n")
            out.flush()


def _translated(
    block: list[str], translator: Translator, search: KnnSearch | None, knn: KnnSettings, shown: int
) -> Iterator[str]:
    """Translations, with explanations where they are asked for; an empty line stays an empty line."""
    numbers = [number for number, line in enumerate(block) if line.strip()]
    texts = dict(zip(numbers, translator.translate([block[number] for number in numbers]).texts, strict=True))
    for number, line in enumerate(block):
        yield texts.get(number, "")
        if search is not None and shown and number in texts:
            yield from explanation.explanation_lines(explanation.explain(search, knn, line, texts[number], shown))


if __name__ == "__main__":
    run_script(translate)
