"""Plain text in two files."""

from collections.abc import Iterator
from itertools import zip_longest

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import PairChecker
from lightning_knnmt.data.readers.corpus import CorpusFile
from lightning_knnmt.data.readers.lines import numbered_lines
from lightning_knnmt.data.readers.opening import open_bytes


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
    with open_bytes(corpus.path, recode=True) as src_file, open_bytes(corpus.tgt_path, recode=True) as tgt_file:
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
