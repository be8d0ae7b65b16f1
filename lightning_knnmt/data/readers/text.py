"""Plain text in two files, and tab-separated text in one."""

from collections.abc import Iterator
from itertools import zip_longest

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile
from lightning_knnmt.data.readers.lines import numbered_lines, readable_lines


def read_text(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads line n of `path` with line n of `tgt_path`.

    Args:
        corpus: A plain text corpus.
        checker: Receives the raw sides.

    Raises:
        MalformedCorpusError: Under `malformed: error`, also for files of different lengths.
    """
    if corpus.tgt_path is None:
        raise ValueError(f"tgt_path is not given, expected the target side of the plain text file {corpus.path}")
    with corpus.path.open("rb") as src_file, corpus.tgt_path.open("rb") as tgt_file:
        src_lines = numbered_lines(src_file, corpus.max_characters)
        tgt_lines = numbered_lines(tgt_file, corpus.max_characters)
        for matched, (src, tgt) in enumerate(zip_longest(src_lines, tgt_lines)):
            if src is None or tgt is None:
                longer, shorter, rest = (corpus.path, corpus.tgt_path, src_lines)
                if src is None:
                    longer, shorter, rest = (corpus.tgt_path, corpus.path, tgt_lines)
                surplus = 1 + sum(1 for _ in rest)
                found = f"{matched + surplus} lines in {longer} but {matched} lines in {shorter}"
                for _ in range(surplus):
                    checker.reject(f"{longer}:{matched + 1}", "no counterpart", found, "as many lines in both files")
                return
            unreadable = next((line for line in (src, tgt) if line.text is None), None)
            if unreadable is not None:
                checker.reject(unreadable.where, unreadable.reason, unreadable.found, unreadable.expected)
            elif pair := checker.pair(src.text or "", tgt.text or "", "", src.where, tgt.where):
                yield pair


def read_tsv(corpus: CorpusFile, checker: PairChecker) -> Iterator[Pair]:
    """Reads the columns src, tgt and optionally document, without quoting.

    Args:
        corpus: A tab-separated corpus.
        checker: Receives the raw sides.
    """
    expected = "the columns src, tgt and optionally document, separated by tabs"
    with corpus.path.open("rb") as file:
        for where, text in readable_lines(file, corpus.max_characters, checker):
            columns = text.split("\t")
            if len(columns) < 2:
                checker.reject(where, "missing column", "1 column", expected)
            elif len(columns) > 3:
                checker.reject(where, "extra column", f"{len(columns)} columns", expected)
            elif pair := checker.pair(columns[0], columns[1], columns[2] if len(columns) == 3 else "", where):
                yield pair
