"""Train, validation and test splits that share no source, written with counts and hashes."""

import hashlib
import json
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from lightning_knnmt.checks import check_at_least, check_one_of, refuse_existing
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.sentences import SentenceSplitter
from lightning_knnmt.data.windows import Window

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class SplitConfig:
    """How a corpus is divided.

    A unit is a document where the corpus has documents and `by` says so, else one source text with all its
    translations.

    Attributes:
        validation: Number of units held out for validation.
        test: Number of units held out for testing.
        min_words: Held-out sources have at least this many words; shorter ones of held-out documents are dropped.
        by: What is kept together.
        seed: Seed of the draw, to which the order of the pairs does not matter.
        sentences: Languages, such as `en-pt`, by whose rules training pairs are cut into sentences, none of which is
            a held-out source: for models that store sentences one by one. Empty: pairs are taken whole.
    """

    validation: int
    test: int
    min_words: int = 1
    by: Literal["document", "source"] = "document"
    seed: int = 1
    sentences: str = ""

    def __post_init__(self) -> None:
        check_one_of(("document", "source"), by=self.by)
        check_at_least(0, validation=self.validation, test=self.test, min_words=self.min_words)


def source_key(text: str) -> str:
    """The form under which two sources count as the same: case and white space aside."""
    return " ".join(text.casefold().split())


def split(
    pairs: Iterable[Pair], config: SplitConfig, exclude: frozenset[str] = frozenset()
) -> tuple[dict[str, list[Pair]], Counter[str]]:
    """Divide pairs into splits without a source in common.

    Repeated pairs are kept once. A held-out source that also occurs in the training split is dropped from the
    held-out one, so that no test source is in a datastore built from the training split. A held-out source is kept
    once, with the first of its translations. Every pair comes out in one split or is counted as dropped.

    Args:
        pairs: The corpus.
        config: Sizes, unit and seed.
        exclude: Texts, as `source_key` writes them; pairs with such a source or target are dropped.

    Returns:
        The splits by name, and how many pairs were dropped, by reason.

    Raises:
        ValueError: The corpus has too few units to draw from.
    """
    dropped: Counter[str] = Counter()
    units: dict[tuple[str, str], list[Pair]] = {}
    seen: set[tuple[str, str]] = set()
    for pair in pairs:
        if (pair.src, pair.tgt) in seen:
            dropped["repeated"] += 1
        elif exclude and (source_key(pair.src) in exclude or source_key(pair.tgt) in exclude):
            dropped["excluded"] += 1
        else:
            seen.add((pair.src, pair.tgt))
            is_document = config.by == "document" and pair.document
            unit = (pair.document, "") if is_document else ("", source_key(pair.src))
            units.setdefault(unit, []).append(pair)

    eligible = sorted(unit for unit, members in units.items() if any(_long_enough(m, config) for m in members))
    wanted = config.validation + config.test
    if wanted > len(eligible):
        raise ValueError(
            f"validation + test is {wanted} units, but only {len(eligible)} {config.by} units have a source of "
            f"min_words={config.min_words} words or more; lower validation, test or min_words"
        )
    drawn = random.Random(config.seed).sample(eligible, wanted)
    held_out = {"validation": drawn[: config.validation], "test": drawn[config.validation :]}

    in_training = units.keys() - set(drawn)
    splits = {"train": [pair for unit, members in units.items() if unit in in_training for pair in members]}
    elsewhere = {source_key(pair.src) for pair in splits["train"]}
    if config.sentences:
        elsewhere |= {source_key(pair.src) for pair in SentenceSplitter(config.sentences).pairs(splits["train"])}
    for name in ("test", "validation"):
        splits[name] = []
        kept: set[str] = set()
        for pair in (pair for unit in held_out[name] for pair in units[unit]):
            key = source_key(pair.src)
            if key in elsewhere:
                dropped[f"{name}: source in another split"] += 1
            elif key in kept:
                dropped[f"{name}: source occurs again"] += 1
            elif not _long_enough(pair, config):
                dropped[f"{name}: under min_words"] += 1
            else:
                kept.add(key)
                splits[name].append(pair)
        elsewhere |= kept
    return splits, dropped


def _long_enough(pair: Pair, config: SplitConfig) -> bool:
    return len(pair.src.split()) >= config.min_words


def write_splits(
    folder: Path,
    splits: Mapping[str, Sequence[Pair | Window]],
    facts: Mapping[str, Any],
    overwrite: bool = True,
) -> dict[str, Any]:
    """Write `train.jsonl`, `validation.jsonl`, `test.jsonl` and `splits.json` with counts, hashes and `facts`.

    All files are complete beside the old ones before the first of those is replaced.

    Args:
        folder: Where they go.
        splits: The splits by name.
        facts: What else `splits.json` is to hold.
        overwrite: Replace files that hold something else.

    Returns:
        What `splits.json` holds.

    Raises:
        ValueError: A file is there, holds something else, and is not to be replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    description: dict[str, Any] = dict(facts)
    beside: dict[Path, Path] = {}  # [file -> its new content]
    try:
        for name in SPLITS:
            lines = [json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in splits[name]]
            content = "".join(lines).encode()
            _write_beside(folder / f"{name}.jsonl", content, beside)
            description[name] = {
                "pairs": len(lines),
                "src_words": sum(len(pair.src.split()) for pair in splits[name]),
                "tgt_words": sum(len(pair.tgt.split()) for pair in splits[name]),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        facts_text = json.dumps(description, indent=2, ensure_ascii=False) + "\n"
        _write_beside(folder / "splits.json", facts_text.encode(), beside)
        for file, partial in beside.items():
            if file.exists() and file.read_bytes() != partial.read_bytes():
                refuse_existing(overwrite, out=file)
        for file, partial in beside.items():
            partial.replace(file)
    finally:
        for partial in beside.values():
            partial.unlink(missing_ok=True)
    return description


def refuse_other_splits(folder: Path, facts: Mapping[str, Any], overwrite: bool) -> None:
    """Refuse to make splits where there are some of another corpus or configuration, before any of them is made.

    Args:
        folder: Where they go.
        facts: What `splits.json` would hold, as far as it is known.
        overwrite: Replace what is there.

    Raises:
        ValueError: There are other splits, or a `splits.json` that cannot be read.
    """
    file = folder / "splits.json"
    if overwrite or not file.exists():
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}); name another folder, or give --overwrite true") from error
    wanted = json.loads(json.dumps(facts))
    different = [name for name in wanted if not isinstance(there, dict) or there.get(name) != wanted[name]]
    if different:
        raise ValueError(
            f"out is {folder}, which holds splits of another {' and '.join(different)}; name another folder, or give "
            "--overwrite true"
        )


def _write_beside(file: Path, content: bytes, beside: dict[Path, Path]) -> None:
    beside[file] = file.with_name(file.name + ".partial")
    beside[file].unlink(missing_ok=True)  # a link goes, and not what it names
    beside[file].write_bytes(content)


def read_split(file: Path) -> list[Pair]:
    """Read a split that `write_splits` wrote.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: A line is no JSON object of the texts src and tgt and, perhaps, a document.
    """
    if not file.exists():
        raise FileNotFoundError(f"{file} does not exist; write it with prepare_data.py")
    with file.open(encoding="utf-8") as lines:
        return [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, start=1)]


def _parse(line: str, where: str) -> Pair:
    try:
        record = json.loads(line)
        pair = Window(**record).pair if Window.is_one(record) else Pair(**record)
        if not all(isinstance(text, str) for text in (pair.src, pair.tgt, pair.document)):
            raise TypeError("a text is something else")
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: expected a JSON object with the texts src, tgt and document, found {line.strip()[:80]!r}; "
            "write the file with prepare_data.py"
        ) from error
    return pair


def texts_of(files: Iterable[Path]) -> Iterator[str]:
    """Source and target texts, as `source_key` writes them, of split files."""
    for file in files:
        for pair in read_split(file):
            yield from (source_key(pair.src), source_key(pair.tgt))
