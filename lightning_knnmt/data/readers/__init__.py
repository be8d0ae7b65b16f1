"""Readers of parallel corpora: plain text, TSV, CSV, JSONL, TMX, XLIFF and gettext, all as a stream of pairs."""

import logging
from collections.abc import Callable, Iterator

from lightning_knnmt.checks import shorten
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import MalformedCorpusError, PairChecker, ReadReport
from lightning_knnmt.data.readers.columns import read_csv, read_tsv
from lightning_knnmt.data.readers.corpus import CorpusFile, FileFormat
from lightning_knnmt.data.readers.gettext_catalog import msgid_side, read_mo, read_po
from lightning_knnmt.data.readers.jsonl import read_jsonl
from lightning_knnmt.data.readers.text import read_text
from lightning_knnmt.data.readers.tmx import read_tmx
from lightning_knnmt.data.readers.xliff import read_xliff

__all__ = ["CorpusFile", "MalformedCorpusError", "ReadReport", "msgid_side", "read_pairs"]

log = logging.getLogger(__name__)

_READERS: dict[FileFormat, Callable[[CorpusFile, PairChecker], Iterator[Pair]]] = {
    "text": read_text,
    "tsv": read_tsv,
    "csv": read_csv,
    "jsonl": read_jsonl,
    "tmx": read_tmx,
    "xliff": read_xliff,
    "po": read_po,
    "mo": read_mo,
}


def read_pairs(corpus: CorpusFile, report: ReadReport | None = None) -> Iterator[Pair]:
    """Reads the pairs of one corpus in file order, one at a time.

    Memory does not grow with the file, except for gettext, which is read whole. The first pair is logged, so that a
    corpus that is read the wrong way round shows at once.

    Args:
        corpus: Where the corpus is and how to read it.
        report: Filled while the pairs are drawn; complete once the iterator is exhausted. None: what is skipped is
            logged then.

    Returns:
        A lazy iterator of pairs with stripped, non-empty sides.

    Raises:
        FileNotFoundError: At the call, when a file of the corpus is missing.
        IsADirectoryError: At the call, when a path is a folder.
        MalformedCorpusError: While iterating, at the first malformed item under `malformed: error`, and for
            an unreadable gettext file always.
    """
    for option, path in (("path", corpus.path), ("tgt_path", corpus.tgt_path)):
        if path is None:
            continue
        if not path.exists():
            raise FileNotFoundError(f"{option} is {path}, which does not exist, expected a corpus file")
        if path.is_dir():
            raise IsADirectoryError(
                f"{option} is {path}, which is a folder, expected a corpus file; name one file in it"
            )
    return _logged(corpus, report)


def _logged(corpus: CorpusFile, report: ReadReport | None) -> Iterator[Pair]:
    checker = PairChecker(corpus, ReadReport() if report is None else report)
    is_first = checker.report.read == 0
    for pair in _READERS[corpus.file_format](corpus, checker):
        if is_first:
            is_first, sides = False, (shorten(pair.src, 60), shorten(pair.tgt, 60))
            log.info("%s: read as %s%s, first pair %r → %r", corpus.path, corpus.file_format, _way(corpus), *sides)
        yield pair
    if report is None and checker.report.skipped:
        log.warning("%s: %s", corpus.path, checker.report)


def _way(corpus: CorpusFile) -> str:
    """Between which languages a file is read, where the format tells."""
    if corpus.file_format in ("po", "mo"):
        return f" with msgid as {'source' if msgid_side(corpus) == 'src' else 'target'}"
    return f" from {corpus.src_lang} to {corpus.tgt_lang}" if corpus.file_format in ("tmx", "xliff") else ""
