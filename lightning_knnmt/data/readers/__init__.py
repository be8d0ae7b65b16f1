"""Readers of parallel corpora: plain text, TSV, JSONL, TMX and gettext, all as a stream of pairs."""

from collections.abc import Callable, Iterator

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers.checks import MalformedCorpusError, PairChecker, ReadReport
from lightning_knnmt.data.readers.corpus import CorpusFile, FileFormat
from lightning_knnmt.data.readers.gettext_catalog import read_mo, read_po
from lightning_knnmt.data.readers.jsonl import read_jsonl
from lightning_knnmt.data.readers.text import read_text, read_tsv
from lightning_knnmt.data.readers.tmx import read_tmx

__all__ = ["CorpusFile", "MalformedCorpusError", "ReadReport", "read_pairs"]

_READERS: dict[FileFormat, Callable[[CorpusFile, PairChecker], Iterator[Pair]]] = {
    "text": read_text,
    "tsv": read_tsv,
    "jsonl": read_jsonl,
    "tmx": read_tmx,
    "po": read_po,
    "mo": read_mo,
}


def read_pairs(corpus: CorpusFile, report: ReadReport | None = None) -> Iterator[Pair]:
    """Reads the pairs of one corpus in file order, one at a time.

    Memory does not grow with the file, except for gettext, which is read whole.

    Args:
        corpus: Where the corpus is and how to read it.
        report: Filled while the pairs are drawn; complete once the iterator is exhausted.

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
    checker = PairChecker(corpus, report if report is not None else ReadReport())
    return _READERS[corpus.file_format](corpus, checker)
