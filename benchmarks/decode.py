"""Speed of decoding: ``python benchmarks/decode.py --quick``.

The own loop beside `generate`, with neighbors and without, over the whole vocabulary, over a shortlist and in 8-bit
integers; greedy search on one thread beside a native engine where its wheel is installed (see native_engine.py). All
ways translate the same sentences in turn, several times; medians are compared, and the spans of a step are shown as a
table and, with `--picture`, as a picture. With `--quick`, a tiny model is made on the spot, with a table of likely
words learned from its translation memory: it shows that all runs, not how fast it is.

The headline `ratio` is tokens/s with neighbors ÷ plain, own loop, beam 4, whole vocabulary, float32.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
from matplotlib.figure import Figure
from native_engine import native_translator
from tiny_setting import make_setting

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.sentences import join
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.decoding import Decoding, Translations, Translator
from lightning_knnmt.decoding.shortlist import learn_shortlist, save_shortlist
from lightning_knnmt.decoding.translator import Loop
from lightning_knnmt.evaluation.scores import corpus_scores, paired_bootstrap
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import open_memory
from lightning_knnmt.timing import Spans

GOALS = {"ratio": 0.95, "ratio_greedy": 0.95, "own_loop_over_generate": 2.0, "native": 1.0, "native_plain": 1.1}
SPANS = ("encoder", "decoder", "projection", "search", "mix", "scores", "beams", "bookkeeping")
ENGINE = "native engine, greedy"


@dataclass(frozen=True)
class Way:
    """One way to translate.

    Attributes:
        neighbors: Whether they are mixed in.
        beams: 1: greedy, on one thread.
        shortlist: Whether only likely tokens are predicted.
        int8: Whether linear layers compute in 8-bit integers.
        loop: Whose search it is.
        bfloat16: Whether weights and activations are of that type.
    """

    neighbors: bool
    beams: int
    shortlist: bool = False
    int8: bool = False
    loop: Loop = "own"
    bfloat16: bool = False

    @property
    def whole(self) -> "Way":
        """The same with the whole vocabulary in float32."""
        return Way(self.neighbors, self.beams)

    def __str__(self) -> str:
        words = ["neighbors" if self.neighbors else "plain", "greedy" if self.beams == 1 else f"beam {self.beams}"]
        words += ["generate"] if self.loop == "generate" else []
        words += ["shortlist"] if self.shortlist else []
        words += ["bfloat16"] if self.bfloat16 else []
        return ", ".join(words + (["int8"] if self.int8 else []))

    def options(self) -> dict[str, str]:
        """How the model is loaded."""
        return {"dtype": "bfloat16" if self.bfloat16 else "float32", "quantization": "int8" if self.int8 else "none"}


def ways_of(beams: int, bfloat16: bool) -> list[Way]:
    """All ways that are compared."""
    ways = [Way(neighbors, beams, loop="generate") for neighbors in (False, True)]
    for each in (beams, 1):
        for shortlist, int8 in ((False, False), (True, False), (False, True), (True, True)):
            ways += [Way(neighbors, each, shortlist, int8) for neighbors in (False, True)]
        ways += [Way(neighbors, each, bfloat16=True) for neighbors in (False, True) if bfloat16]
    return ways


def engine(model: KeyedModel, direction: str) -> Callable[[list[str]], Translations]:
    """The native engine, which gets the sentences that the model is given, one by one.

    Raises:
        ImportError: It is not installed.
    """
    native = native_translator(direction)

    def translate(sources: list[str]) -> Translations:
        sentences = [model.split(text) for text in sources]
        start = time.perf_counter()
        found = [[native(sentence.text) for sentence in of_text] for of_text in sentences]
        seconds = time.perf_counter() - start
        texts = [join(iter(each), of_text) for each, of_text in zip(found, sentences, strict=True)]
        return Translations(texts, 0, seconds, Spans())

    return translate


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Translate everything in each way, in turn, and compare."""
    pairs = read_split(options.data / "test.jsonl")[: options.count]
    sources, references = [pair.src for pair in pairs], [pair.tgt for pair in pairs]
    settings = KnnSettings(options.k, options.lambda_, options.temperature, options.nprobe)
    runs: dict[Way | str, list[Translations]] = {}
    with open_memory(options.store) as memory:
        models: dict[tuple[str, ...], KeyedModel] = {}
        work: dict[Way | str, Callable[[list[str]], Translations]] = {}
        for way in ways_of(options.beams, options.bfloat16):
            loaded = tuple(way.options().values())
            if loaded not in models:
                models[loaded] = load_model(str(options.model), device="cpu", **way.options())
            model = models[loaded]
            mixture = settings.open(model, memory) if way.neighbors else PlainModel()
            shortlist = options.shortlist if way.shortlist else None
            decoding = Decoding(
                way.beams, options.batch_size, options.max_new_tokens, loop=way.loop, shortlist=shortlist
            )
            work[way] = Translator(model, mixture, decoding).translate
        if not options.quick:
            try:
                work[ENGINE] = engine(models["float32", "none"], options.direction)
            except ImportError as error:
                print(f"{error}; without it")
        for repeat in range(options.repeats + 1):
            for name, translate in work.items():
                greedy = name == ENGINE or (isinstance(name, Way) and name.beams == 1)
                common.set_threads(1 if greedy else options.threads)
                if repeat:
                    runs.setdefault(name, []).append(translate(sources))
                else:
                    translate(sources[:8])  # a warm-up
    return report(options, runs, references)


def report(
    options: argparse.Namespace, runs: dict[Way | str, list[Translations]], references: list[str]
) -> dict[str, Any]:
    """Medians of seconds, their ratios, BLEU, and the spans of each way."""
    seconds = {name: statistics.median(run.seconds for run in each) for name, each in runs.items()}
    speeds = {name: runs[name][0].tokens / seconds[name] for name in runs if name != ENGINE}

    def ratios(beams: int) -> dict[str, float]:
        """With neighbors ÷ plain, over the whole vocabulary and in the other ways."""
        plain = [way for way in speeds if isinstance(way, Way) and not way.neighbors and way.beams == beams]
        return {str(way): round(speeds[replace(way, neighbors=True)] / speeds[way], 3) for way in plain}

    by_beams = {beams: ratios(beams) for beams in (options.beams, 1)}
    generate = speeds[Way(False, options.beams, loop="generate")]
    over_generate = {
        str(way): round(speed / generate, 3)
        for way, speed in speeds.items()
        if isinstance(way, Way) and way.beams == options.beams and not way.neighbors
    }
    result: dict[str, Any] = {
        "ratio": by_beams[options.beams][str(Way(False, options.beams))],
        "ratio_greedy": by_beams[1][str(Way(False, 1))],
        "own_loop_over_generate": over_generate[str(Way(False, options.beams))],
        "native": None,
        "native_plain": None,
        "goals": GOALS,
        "ratios_of_each_way": {**by_beams[options.beams], **by_beams[1]},
        "over_generate_of_each_way": over_generate,
    }
    if ENGINE in seconds:
        over = {
            way: round(seconds[ENGINE] / value, 3)
            for way, value in seconds.items()
            if way != ENGINE and way.beams == 1  # type: ignore[union-attr]
        }
        best = {neighbors: Way(neighbors, 1, True, True) for neighbors in (True, False)}
        result |= {"native": over[best[True]], "native_plain": over[best[False]]}
        result["native_of_each_way"] = {str(way): value for way, value in over.items()}
    result["seconds"] = {str(name): round(value, 2) for name, value in seconds.items()}
    result["all_seconds"] = {str(name): [round(run.seconds, 2) for run in each] for name, each in runs.items()}
    result["tokens_per_second"] = {str(name): round(speed) for name, speed in speeds.items()}
    result["bleu"] = {
        str(name): round(corpus_scores(each[0].texts, references).bleu.value, 2) for name, each in runs.items()
    }
    result["bleu_over_whole"] = {
        str(way): against_whole(way, runs, references)
        for way in runs
        if isinstance(way, Way) and way.loop == "own" and way != way.whole
    }
    result["spans"] = {str(way): spans_of(runs[way]) for way in runs if isinstance(way, Way) and way.loop == "own"}
    settings = {name: str(value) for name, value in vars(options).items() if name not in ("json", "quick", "picture")}
    return result | {"settings": settings, **common.environment()}


def against_whole(way: Way, runs: dict[Way | str, list[Translations]], references: list[str]) -> dict[str, float]:
    """The difference in BLEU from the same search over the whole vocabulary in float32, with its 95 % interval."""
    bleu = paired_bootstrap(runs[way.whole][0].texts, runs[way][0].texts, references).bleu
    return {"delta": round(bleu.delta, 2), "low": round(bleu.low, 2), "high": round(bleu.high, 2)}


def spans_of(runs: list[Translations]) -> dict[str, float]:
    """Median seconds of each span, and what is left, such as tokenizing."""
    spans = {name: statistics.median(run.spans.seconds.get(name, 0.0) for run in runs) for name in SPANS}
    spans["rest"] = max(0.0, statistics.median(run.seconds for run in runs) - sum(spans.values()))
    return {name: round(value, 4) for name, value in spans.items()}


def tables(result: dict[str, Any]) -> str:
    """Speeds, and spans, as Markdown tables."""
    rows = ["| way | seconds | tokens/s | BLEU | difference, 95 % interval |", "|---|---|---|---|---|"]
    for name, seconds in result["seconds"].items():
        difference = result["bleu_over_whole"].get(name)
        words = "" if difference is None else "{delta:+.2f} ({low:+.2f} to {high:+.2f})".format(**difference)
        speed = result["tokens_per_second"].get(name, "")
        rows.append(f"| {name} | {seconds} | {speed} | {result['bleu'][name]:.2f} | {words} |")
    names = [*SPANS, "rest"]
    rows += ["", f"| seconds of | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for name, spans in result["spans"].items():
        rows.append(f"| {name} | {' | '.join(f'{spans[each]:.2f}' for each in names)} |")
    return "\n".join(rows)


def draw(result: dict[str, Any], path: Path) -> None:
    """The spans of each way as bars."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes, ways = figure.subplots(), list(result["spans"])
    left = [0.0] * len(ways)
    for name in (*SPANS, "rest"):
        widths = [result["spans"][way][name] for way in ways]
        axes.barh(ways, widths, left=left, label=name)
        left = [before + width for before, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds (beam search: two threads, greedy search: one)")
    axes.legend(ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(arguments: list[str] | None = None) -> None:
    """Measure, print tables, and write all figures as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model made on the spot")
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--picture", type=Path, help="file for a picture of the spans")
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"), help="the imported model")
    parser.add_argument("--store", type=Path, default=Path("runs/demo/store"), help="its datastore")
    parser.add_argument("--data", type=Path, default=Path("data/pretix"), help="folder of the splits")
    parser.add_argument("--direction", default="enpt", help="enpt or pten: which of its models the native engine loads")
    parser.add_argument("--shortlist", default="model", help="`model`, or a .npz file with a learned table")
    parser.add_argument("--bfloat16", action="store_true", help="also in bfloat16")
    parser.add_argument("--count", type=int, default=400, help="texts")
    parser.add_argument("--repeats", type=int, default=3, help="timed repeats of each way")
    parser.add_argument("--threads", type=int, default=2, help="threads of beam search; greedy search has one")
    for name, value in (("beams", 4), ("batch_size", 32), ("max_new_tokens", 256), ("k", 64), ("nprobe", 8)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--lambda", dest="lambda_", type=float, default=0.5)
    parser.add_argument("--temperature", type=float, default=67.0)
    parser.add_argument("--seed", type=int, default=1, help="of the tiny model")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        if options.quick:
            options.model, options.data, options.store = make_setting(Path(folder), options.seed)
            options.count, options.repeats, options.max_new_tokens = 24, 2, 24
            options.k, options.shortlist = 8, str(Path(folder, "table.npz"))
            model = load_model(str(options.model), device="cpu")
            save_shortlist(learn_shortlist(model, read_split(options.data / "train.jsonl")), Path(options.shortlist))
        result = measure(options)
    print(tables(result))
    for name in GOALS:
        print(f"{name} {result[name]} (goal {GOALS[name]})")
    if options.picture is not None:
        draw(result, options.picture)
    if options.json is not None:
        common.write_json(options.json, result)


if __name__ == "__main__":
    main()
