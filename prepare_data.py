"""Fetch a corpus, clean it and write its splits: ``python prepare_data.py --config configs/data/pretix.yaml``."""

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from jsonargparse import auto_cli

from lightning_knnmt.data.cleaning import Cleaning
from lightning_knnmt.data.readers import ReadReport
from lightning_knnmt.data.recipes import Corpus
from lightning_knnmt.data.splits import SplitConfig, split, texts_of, write_splits

log = logging.getLogger("lightning_knnmt.prepare_data")


def prepare(
    corpus: Corpus,
    splits: SplitConfig,
    out: Path,
    cleaning: Cleaning | None = None,
    exclude: list[Path] | None = None,
    cache: Path = Path("data/cache"),
) -> None:
    """Fetch, clean, split and write a parallel corpus.

    Args:
        corpus: Where the pairs come from.
        splits: How they are divided.
        out: Folder for train.jsonl, validation.jsonl, test.jsonl and splits.json.
        cleaning: What is done to each pair; none if not given.
        exclude: Split files of other corpora; pairs that have a text in common with them are dropped.
        cache: Folder for downloads.
    """
    report = ReadReport()
    dropped: Counter[str] = Counter()
    pairs = corpus.pairs(cache, report)
    if cleaning is not None:
        pairs = cleaning(pairs, dropped)
    parts, lost = split(pairs, splits, frozenset(texts_of(exclude or [])))
    facts = {
        "corpus": {"class": type(corpus).__name__, **{key: str(value) for key, value in vars(corpus).items()}},
        "config": asdict(splits),
        "read": report.read,
        "dropped": dict(Counter(report.skipped) + dropped + lost),
    }
    written = write_splits(out, parts, facts)
    log.info("read %d pairs, dropped %s", report.read, facts["dropped"])
    for name in parts:
        log.info("%s: %s", out / f"{name}.jsonl", written[name])


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    auto_cli(prepare, as_positional=False)
