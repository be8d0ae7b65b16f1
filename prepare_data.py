"""Fetch a corpus, clean it and write its splits: ``python prepare_data.py --config configs/data/pretix.yaml``."""

import logging
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning_knnmt.checks import check_folder
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.cleaning import Cleaning
from lightning_knnmt.data.readers import ReadReport
from lightning_knnmt.data.recipes import Corpus
from lightning_knnmt.data.splits import SplitConfig, refuse_other_splits, split, texts_of, write_splits
from lightning_knnmt.data.windows import Windows

log = logging.getLogger("lightning_knnmt.prepare_data")


def prepare(
    corpus: Corpus,
    splits: SplitConfig,
    out: Path,
    cleaning: Cleaning | None = None,
    exclude: list[Path] | None = None,
    cache: Path = Path("data/cache"),
    windows: Windows | None = None,
    overwrite: bool = False,
) -> None:
    """Fetch, clean, split and write a parallel corpus, or documents for a language model.

    Args:
        corpus: Where the pairs come from.
        splits: How they are divided.
        out: Folder for train.jsonl, validation.jsonl, test.jsonl and splits.json.
        cleaning: What is done to each pair; none if not given.
        exclude: Split files of other corpora; pairs that have a text in common with them are dropped.
        cache: Folder for downloads.
        windows: How the documents of a language model are cut after they were divided; none if the corpus is parallel.
        overwrite: Replace splits in `out` that differ; otherwise they are an error.
    """
    check_folder(out=out, cache=cache)
    facts: dict[str, Any] = {
        "corpus": {"class": type(corpus).__name__, **{key: str(value) for key, value in vars(corpus).items()}},
        "config": asdict(splits),
    }
    cutting = {} if windows is None else {"windows": asdict(windows)}
    refuse_other_splits(out, facts | cutting, overwrite)
    excluded = frozenset(texts_of(exclude or []))
    report = ReadReport()
    unclean: Counter[str] = Counter()
    raw = corpus.pairs(cache, report)
    pairs = list(raw if cleaning is None else cleaning(raw, unclean))
    log.info("%s", report)
    log.info("cleaning dropped %s", _listed(unclean))
    parts, lost = split(pairs, splits, excluded)
    log.info("splitting dropped %s", _listed(lost))
    facts |= {"read": report.read, "dropped": dict(report.skipped + unclean + lost)} | cutting
    cut = parts if windows is None else {name: list(windows(documents)) for name, documents in parts.items()}
    written = write_splits(out, cut, facts, overwrite)
    for name in parts:
        log.info("%s: %s", out / f"{name}.jsonl", written[name])


def _listed(reasons: Counter[str]) -> str:
    """The counts in words, the largest first.

    >>> _listed(Counter({"no letters": 1, "repeated": 12}))
    '13 (repeated: 12, no letters: 1)'
    """
    listed = ", ".join(f"{reason}: {count}" for reason, count in reasons.most_common())
    return f"{reasons.total()} ({listed})" if listed else "0"


if __name__ == "__main__":
    run_script(prepare)
