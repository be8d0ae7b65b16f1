"""Translate text, one sentence a line: ``python translate.py --config runs/demo/translate.yaml < in.txt > out.txt``."""

import itertools
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.checks import check_at_least, check_folder, refuse_existing
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.readers.corpus import format_of_suffix
from lightning_knnmt.data.readers.opening import open_bytes
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain_translator, explanation_lines
from lightning_knnmt.index.config import SearchDevice
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import Gate
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.loading import EnsembleMember, open_translator
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.files import PartialFile, durable_file
from lightning_knnmt.storage.ranks import Processes, started_processes


def translate(
    backbone: BackboneConfig,
    datastore: Path | None = None,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    retriever: Retriever | None = None,
    combiner: Combiner | None = None,
    gate: Gate | None = None,
    decoding: Decoding = Decoding(),
    input: str = "-",
    output: str = "-",
    block: int = 1024,
    explain: int = 0,
    overwrite: bool = False,
    index_device: SearchDevice = "cpu",
    mmap: bool = False,
    translation_memory: CorpusFile | None = None,
    metric: Metric | None = None,
    checksums: bool | None = None,
    pooled_with: list[Path] | None = None,
    ensemble_with: list[EnsembleMember] | None = None,
    processes: Processes = Processes(),
) -> None:
    """Translate UTF-8 text, one sentence a line, with the neighbors of a datastore or with the plain model.

    Args:
        backbone: The model, such as --backbone.model data/models/firefox-en-pt, and how it is loaded.
        datastore: Folder of a datastore built from that model; None: the plain model.
        index: Name of the datastore's index.
        knn: The usual search and mixture, where no class is chosen below.
        retriever: Where neighbors come from, by class_path and init_args.
        combiner: How they are mixed in, by class_path and init_args.
        gate: Which rows search, by class_path and init_args.
        decoding: Beam size, batch size and length.
        input: A text file; `-`: standard input.
        output: Where the translations go; `-`: standard output. A file gets its name when all is translated; what a
            run that is stopped has translated is in a file whose name ends in .partial.
        block: Lines that are read, and batched by length, before the first is written; a line typed on a terminal is
            answered at once.
        explain: Print, for each produced token, this many of its nearest stored contexts; 0: translations only.
        overwrite: Replace a file that is there already.
        index_device: Where the index is searched: `cpu`; `gpu`: divided between all GPUs; `auto`: there if FAISS can;
            `torch_keys`: among all stored keys, by torch on the model's device; `torch_codes`: among all its codes.
        mmap: Leave the index's entries on the disk, for an index that is larger than memory.
        translation_memory: Pairs as they stand, for a retriever that needs no stored keys; in place of a datastore.
        metric: That of the index, by which temperature and λ were chosen; an index of another is refused. None: any.
        checksums: Compare the datastore's bytes with their checksums first; null: those of files up to 256 MB in all.
        pooled_with: Folders of further datastores of the same model, searched together with the first by indexes of the
            same name.
        ensemble_with: Further models, each with a `backbone`, a `datastore`, options for neighbors as above, and a
            `weight`: their probabilities are averaged with the first model's, whose weight is 1, at every step.
        processes: Processes that share the sentences and search together, each with its part of an index that was
            built with `layout: shards`; the first reads and writes.
    """
    check_at_least(1, block=block)
    check_at_least(0, explain=explain)
    if explain and datastore is None and translation_memory is None and not ensemble_with:
        raise ValueError(f"explain is {explain}, which shows stored contexts, but no datastore is given; give one too")
    several = processes.devices * processes.num_nodes > 1 or started_processes()[1] > 1
    if explain and several:
        raise ValueError(f"explain is {explain}, which one process does alone, but processes is {processes}")
    if "-" not in (input, output) and Path(output).exists() and Path(output).samefile(input):
        raise ValueError(f"output is {output}, the same file as input; give another")
    to_file = output != "-" and not _is_device(Path(output))
    if to_file:
        check_folder(output=Path(output).parent)
        refuse_existing(overwrite, output=Path(output))
    if (known := format_of_suffix(Path(input))) not in (None, "text"):
        raise ValueError(
            f"input is {input}, a corpus in {known}, expected plain text, one sentence a line; take out its source side"
        )
    if input != "-" and not Path(input).exists():
        raise FileNotFoundError(f"input is {input}, which does not exist, expected a text file")
    with ExitStack() as stack:
        start = (lambda model: stack.enter_context(processes.start(model))) if several else None
        translator = open_translator(
            backbone, datastore, index, knn, retriever, combiner, gate, decoding, index_device, mmap,
            translation_memory, metric, checksums, pooled_with, ensemble_with, start,
        )  # fmt: skip
        source: BinaryIO = sys.stdin.buffer if input == "-" else stack.enter_context(open_bytes(Path(input), True))
        out: Any = sys.stdout.buffer
        if output != "-" and translator.ranks.rank == 0:
            path = Path(output)
            out = stack.enter_context(durable_file(path, keep=True) if to_file else path.open("wb"))
        lines = decoded(source, "standard input" if input == "-" else input)
        at_once = 1 if input == "-" and source.isatty() else block
        while rows := translator.ranks.first(lambda: list(itertools.islice(lines, at_once))):
            for line in _explained(rows, translator, explain) if explain else _translated(rows, translator):
                if translator.ranks.rank == 0:
                    out.write(line.encode() + b"\n")
            if translator.ranks.rank == 0:
                out.flush()
            if isinstance(out, PartialFile):
                out.check()


def _is_device(path: Path) -> bool:
    """Whether a path leads to a terminal, a pipe or the like, which is written to where it is."""
    return path.exists() and not path.is_file() and not path.is_dir()


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


def _explained(rows: list[str], translator: Translator, shown: int) -> Iterator[str]:
    """Each translation with the contexts behind its tokens, indented; an empty row stays an empty line."""
    for row in rows:
        if row.strip():
            found = explain_translator(translator, row, shown)
            yield _one_line(found.text)
            yield from map(_one_line, explanation_lines(found))
        else:
            yield ""


def _one_line(text: str) -> str:
    return text.replace("\r", " ").replace("\n", " ")


if __name__ == "__main__":
    run_script(translate)
