"""Every method of the family beside the others on the same sentences: ``python benchmarks/methods.py``.

Each method of methods.yaml is tuned on the validation split and written to OUT/NAME.yaml, with which ``translate.py``
translates by it; what is there already is not tuned again. Then all translate the test split. Speed is measured on some
of its sentences, the methods in turn.
"""

import argparse
import logging
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import common
import numpy as np
from method_list import Method, read_methods, read_translate_file, translate_file, without_seed
from tiny_setting import make_setting

from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import read_pairs
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.decoding import Decoding, Translations, Translator
from lightning_knnmt.evaluation.report import table
from lightning_knnmt.evaluation.scores import corpus_scores, paired_bootstrap
from lightning_knnmt.evaluation.tuning import check_apart, tune
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.knn.settings import MixtureConfig
from lightning_knnmt.memory import DatastoreMemory, open_memory

log = logging.getLogger("lightning_knnmt.methods")

PLAIN, BASE = "plain", "fixed"
VALUE_BYTES = 4  # of an entry's token


class Bench:
    """A model, the memories that methods search, and the sentences that all of them translate.

    Args:
        options: The command line.
        methods: By name.
    """

    def __init__(self, options: argparse.Namespace, methods: dict[str, Method]) -> None:
        self.options, self.methods = options, methods
        self.model: KeyedModel = load_model(str(options.model), device="cpu")
        self.decoding = Decoding(options.beams, options.batch_size, options.max_new_tokens)
        validation, test = (read_split(options.data / f"{part}.jsonl") for part in ("validation", "test"))
        check_apart(validation, test)
        self.validation, self.test = sample(validation, options.validation), sample(test, options.sentences)
        self._memories: dict[tuple[Path, str], DatastoreMemory | PairMemory] = {}
        self._plain_bleu: float | None = None

    def memory(self, method: Method) -> DatastoreMemory | PairMemory:
        """The memory of a method, opened once."""
        pairs = method.translation_memory
        where = (pairs.path if pairs else method.datastore or self.options.store, method.index)
        if where not in self._memories:
            self._memories[where] = PairMemory(self.model, read_pairs(pairs)) if pairs else open_memory(*where)
        return self._memories[where]

    def tuned(self) -> dict[str, MixtureConfig]:
        """The mixture of each method, tuned where no file has it."""
        found: dict[str, MixtureConfig] = {}
        for name, method in self.methods.items():
            path = self.options.out / f"{name}.yaml"
            if not path.exists():
                mixture = self._tune(method, method.begin(found))
                backbone = BackboneConfig(str(self.options.model))
                translate_file(path, backbone, method, self.options.store, mixture, self.decoding)
            found[name] = read_translate_file(path)
            log.info("%s: %s", name, found[name])
        return found

    def _tune(self, method: Method, mixture: MixtureConfig) -> MixtureConfig:
        if method.grid is None:
            return mixture
        grid = method.full_grid(mixture, self.options.max_tokens, self.options.finalists)
        memory = self.memory(method)
        found = tune(self.model, memory, mixture, self.validation, grid, self.decoding, self._plain_bleu)
        self._plain_bleu = found.plain_bleu
        return found.best

    def translators(self, mixtures: Mapping[str, MixtureConfig]) -> dict[str, Translator]:
        """A translator of each method."""
        made = {}
        for name, mixture in mixtures.items():
            opened = mixture.open(self.model, self.memory(self.methods[name]))
            made[name] = Translator(self.model, PlainModel() if name == PLAIN else opened, self.decoding)
        return made

    def bytes_per_entry(self, name: str) -> float:
        """Bytes of what the search reads, for each entry of the whole store, of which a method may keep fewer."""
        method, whole = self.methods[name], self.entries(BASE)
        if name == PLAIN or method.translation_memory is not None:
            return 0.0
        folder = method.datastore or self.options.store
        files = {path for pattern in method.files for path in folder.glob(pattern)}
        return (sum(path.stat().st_size for path in files) + VALUE_BYTES * self.entries(name)) / whole

    def entries(self, name: str) -> int:
        """Entries that a method's search finds."""
        memory = self.memory(self.methods[name])
        if isinstance(memory, PairMemory):
            return 0  # stored
        return len(memory) - len(memory.datastore.removed)


def sample(pairs: Sequence[Pair], size: int | None, seed: int = 1) -> list[Pair]:
    """So many pairs at random, in their order; all if there are no more."""
    if size is None or size >= len(pairs):
        return list(pairs)
    chosen = np.random.default_rng(seed).choice(len(pairs), size, replace=False)
    return [pairs[number] for number in sorted(chosen)]


def searches(done: Translations) -> float:
    """Rows that searched, of all rows of all steps."""
    rows = done.spans.counts["gate"] or done.spans.counts["search"]
    return done.spans.counts["search"] / rows if rows else 0.0


def speeds(translators: Mapping[str, Translator], sources: list[str], repeats: int) -> dict[str, list[float]]:
    """Tokens per second of each repeat, the methods in turn."""
    rates: dict[str, list[float]] = {name: [] for name in translators}
    for repeat in range(repeats):
        for name, translator in translators.items():
            done = translator.translate(sources)
            rates[name].append(done.tokens / done.seconds)
        log.info("repeat %d of %d: %s", repeat + 1, repeats, {name: round(each[-1]) for name, each in rates.items()})
    return rates


def measure(options: argparse.Namespace, methods: dict[str, Method]) -> dict[str, Any]:
    """Tune, translate and time."""
    bench = Bench(options, methods)
    mixtures = bench.tuned()
    translators = bench.translators(mixtures)
    sources, references = ([pair.src for pair in bench.test], [pair.tgt for pair in bench.test])
    translations = {}
    for name, translator in translators.items():
        translations[name] = translator.translate(sources)
        log.info("%s: BLEU %.2f", name, corpus_scores(translations[name].texts, references).bleu.value)
    first = {without_seed(name): name for name in reversed(translators)}  # [method -> its first seed]
    timed = {method: translators[name] for method, name in reversed(first.items())}
    rates = speeds(timed, [pair.src for pair in sample(bench.test, options.timed)], options.repeats)
    results = {}
    for name, done in translations.items():
        scores = corpus_scores(done.texts, references)
        against = paired_bootstrap(translations[BASE].texts, done.texts, references).bleu
        results[name] = {
            "title": methods[name].title,
            "bleu": round(scores.bleu.value, 2),
            "chrf": round(scores.chrf.value, 2),
            "interval": {n: round(getattr(against, n), 4) for n in ("delta", "low", "high", "p_value")},
            "tokens_per_second": round(statistics.median(rates[without_seed(name)]), 1),
            "tokens_per_second_repeats": [round(rate, 1) for rate in rates[without_seed(name)]],
            "searches_per_token": round(searches(done), 4),
            "bytes_per_entry": round(bench.bytes_per_entry(name), 1),
            "entries": bench.entries(name),
            "mixture": mixtures[name].plain,
        }
    return {
        "ratio": ratio(results),
        "methods": over_seeds(results),
        "sentences": {"test": len(bench.test), "validation": len(bench.validation), "timed": options.timed},
        "decoding": asdict(bench.decoding),
        "signature": scores.bleu.signature,
        "settings": {name: str(value) for name, value in vars(options).items() if name not in ("json", "quick")},
        **common.environment(),
    }


def ratio(results: Mapping[str, dict[str, Any]]) -> float:
    """Speed of the fastest method that is not shown to be worse than whole store + fixed λ, over that one's."""
    fit = [row["tokens_per_second"] for row in results.values() if row["interval"]["high"] >= 0]
    return round(max(fit) / results[BASE]["tokens_per_second"], 3)


def over_seeds(results: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """A method that was trained with several seeds as the seed of the middle BLEU, with the BLEU of all."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for name, row in results.items():
        groups.setdefault(without_seed(name), []).append(row)
    merged = {}
    for name, rows in groups.items():
        rows = sorted(rows, key=lambda row: row["bleu"])
        middle = rows[len(rows) // 2]
        merged[name] = middle if len(rows) == 1 else middle | {"bleu_of_seeds": [row["bleu"] for row in rows]}
    return merged


def markdown(result: Mapping[str, Any]) -> str:
    """The table of docs/methods.md."""
    rows = [["method", "BLEU", "chrF", "ΔBLEU (95 %)", "tokens/s", "of plain", "searches per token", "bytes per entry"]]
    plain = result["methods"][PLAIN]["tokens_per_second"]
    for name, row in result["methods"].items():
        interval = row["interval"]
        seeds = row.get("bleu_of_seeds")
        rows.append([
            row["title"],
            f"{row['bleu']:.1f}" + (f" ({seeds[0]:.1f}–{seeds[-1]:.1f})" if seeds else ""),
            f"{row['chrf']:.1f}",
            "" if name == BASE else f"{interval['delta']:+.1f} ({interval['low']:+.1f} to {interval['high']:+.1f})",
            f"{row['tokens_per_second']:.0f}",
            f"{row['tokens_per_second'] / plain:.2f}",
            f"{row['searches_per_token']:.2f}",
            f"{row['bytes_per_entry']:.0f}",
        ])  # fmt: skip
    return table(rows)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model and store, made on the spot")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--methods", type=Path, default=Path(__file__).with_suffix(".yaml"), help="what is compared")
    parser.add_argument("--only", nargs="*", metavar="NAME", help=f"names of methods, beside {PLAIN} and {BASE}")
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"))
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"), help="the whole store")
    parser.add_argument("--data", type=Path, default=Path("data/pretix"), help="with validation.jsonl and test.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of tuned configurations")
    parser.add_argument("--sentences", type=int, help="of the test split; all by default")
    parser.add_argument("--validation", type=int, help="sentences of the validation split; all by default")
    parser.add_argument("--timed", type=int, default=64, help="sentences that are translated in each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--max-tokens", type=int, default=2048, help="of a batch in tuning")
    parser.add_argument("--finalists", type=int, default=3, help="settings that BLEU decides between")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    common.set_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.model, options.data, options.store = make_setting(Path(folder), options.seed)
            options.out, options.max_new_tokens, options.finalists = Path(folder) / "out", 16, 1
        words = {name: str(getattr(options, name).resolve()) for name in ("model", "store", "data", "out")}
        chosen = {PLAIN, BASE, *options.only} if options.only else ()
        methods = read_methods(options.methods, words, chosen, options.quick)
        result = measure(options, methods)
    print(markdown(result))
    print(f"\nratio {result['ratio']}")
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
