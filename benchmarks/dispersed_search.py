"""What dispersion is worth in time: ``python benchmarks/dispersed_search.py --only base "fine-tuned, γ 0" "MHE, γ 1"``.

Models of ``benchmarks/dispersion.py train``, each with a datastore of the same pairs in lists that are trained on a
uniform sample and on the shortest sentences alone, by squared distances: microseconds of a held-out query, and
translation quality and tokens a second at each nprobe, in turn so that a busy moment strikes all alike. k, λ and T are
tuned once for each model, on validation with the fair lists. ``ratio`` is decoding speed of the last model over that of
the first in the unfair lists at the largest nprobe.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import torch
from dispersion import VARIANTS, Variant, make_quick, model_of, states_of, study_parser, trained_folder
from numpy.typing import NDArray

from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.building.config import RekeyConfig
from lightning_knnmt.building.rekey import rekey
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translations, Translator
from lightning_knnmt.evaluation.report import table
from lightning_knnmt.evaluation.scores import corpus_scores, paired_bootstrap
from lightning_knnmt.evaluation.tuning import Grid, likelihoods
from lightning_knnmt.index.balance import imbalance_factor
from lightning_knnmt.index.factory import make_index
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.layers import find_ivf
from lightning_knnmt.index.splitting import metric_centroids
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.settings import MixtureConfig
from lightning_knnmt.memory import DatastoreMemory

Keys = NDArray[np.float32]


def lists_on(keys: Keys, sample: Keys, codes: str, options: argparse.Namespace) -> FaissIndex:
    """An index whose centroids are made of a sample, and whose codes are trained on keys of the whole store."""
    index: Any = make_index(f"IVF{options.nlist},{codes}", keys.shape[1])
    ivf: Any = find_ivf(index)
    ivf.quantizer.add(metric_centroids(np.ascontiguousarray(sample), options.nlist, "l2", False))
    index.train(keys[:: max(1, len(keys) // options.code_points)])  # of the codes alone: there are centroids
    for part in np.array_split(keys, 1 + len(keys) // 65536):
        index.add(part)
    return FaissIndex(index)


@dataclass(frozen=True)
class Point:
    """What is timed: a model, alone or with neighbors from one of its indexes.

    Attributes:
        model: Its name.
        sample: What the centroids are made of; None: the model alone.
        codes: Of the entries.
        nprobe: Lists that a query scans.
    """

    model: str
    sample: str | None = None
    codes: str = ""
    nprobe: int = 0

    @property
    def alone(self) -> "Point":
        """The same model without neighbors."""
        return Point(self.model)


class Contestant:
    """A model of the study, with its datastore and its indexes by sample and codes.

    Args:
        variant: The model, trained unless it is there.
        options: Of the command line.
    """

    def __init__(self, variant: Variant, options: argparse.Namespace) -> None:
        folder = trained_folder(variant, options)
        self.name = variant.name
        self.model: PretrainedModel = model_of(variant, folder, options)
        rekey(self.model, RekeyConfig(states_of(options, "train"), folder / "store"))
        self.store = Datastore(folder / "store")
        keys = self.store.sample_keys(len(self.store))
        rows = np.random.default_rng(1).permutation(len(keys))[: options.per_list * options.nlist]
        samples = {
            "uniform": keys[rows],
            f"shortest {options.shortest:.0%}": keys[-int(options.shortest * len(keys)) :],
        }
        self.memories = {
            (sample, codes): DatastoreMemory(self.store, lists_on(keys, part, codes, options))
            for sample, part in samples.items()
            for codes in options.codes
        }
        with Datastore(states_of(options, "validation")) as states, torch.inference_mode():
            found = self.model.outputs(torch.from_numpy(states.sample_keys(1024)))
        self.queries = np.ascontiguousarray(found.half().float().numpy())

    def tune(self, validation: list[Pair]) -> None:
        """k, λ and T by the likelihood of the validation split, with the first index."""
        memory = next(iter(self.memories.values()))
        grid = Grid(k=[8, 16, 32], nprobe=[8], max_tokens=4096)
        candidates, *_ = likelihoods(self.model, memory, MixtureConfig.of(), validation, grid)
        self.mixture = max(candidates, key=lambda candidate: candidate.log_likelihood).mixture

    def memory(self, point: Point) -> DatastoreMemory:
        """The memory of a point."""
        assert point.sample is not None
        return self.memories[point.sample, point.codes]

    def microseconds(self, point: Point, batch: int = 32) -> float:
        """Of a held-out query, in batches."""
        index, start = self.memory(point).index, time.perf_counter()
        for first in range(0, len(self.queries), batch):
            index.search(self.queries[first : first + batch], 16, point.nprobe)
        return 1e6 * (time.perf_counter() - start) / len(self.queries)

    def translate(self, point: Point, sources: list[str], decoding: Decoding) -> Translations:
        """Translations at a point."""
        mixture: Mixture | PlainModel = PlainModel()
        if point.sample is not None:
            mixture = self.mixture.with_options(nprobe=point.nprobe).open(self.model, self.memory(point))
        return Translator(self.model, mixture, decoding).translate(sources)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Times of queries and of translations, in turn, and scores of the translations."""
    named = {variant.name: variant for variant in VARIANTS}
    contestants = {name: Contestant(named[name], options) for name in options.only}
    test, validation = (read_split(options.data / f"{split}.jsonl") for split in ("test", "validation"))
    test = test[: options.sentences]
    for each in contestants.values():
        each.tune(validation[: options.sentences])
    places = list(next(iter(contestants.values())).memories)
    points = [Point(name) for name in contestants]
    points += [Point(name, *place, nprobe) for place in places for nprobe in options.nprobe for name in contestants]
    decoding = Decoding(options.beams, 32, options.max_new_tokens)
    queried: dict[Point, list[float]] = {point: [] for point in points}
    speeds: dict[Point, list[float]] = {point: [] for point in points}
    texts: dict[Point, list[str]] = {}
    result: dict[str, Any] = {}
    for repeat in range(1, options.repeats + 1):
        for point in points:
            each = contestants[point.model]
            if point.sample is not None:
                queried[point].append(each.microseconds(point))
            made = each.translate(point, [pair.src for pair in test], decoding)
            speeds[point].append(made.tokens / made.seconds)
            texts[point] = made.texts
        rows = [
            row_of(point, contestants[point.model], texts, [pair.tgt for pair in test])
            | {"tokens_per_second": statistics.median(speeds[point])}
            | ({"microseconds": statistics.median(queried[point])} if point.sample is not None else {})
            for point in points
        ]
        unfair = [
            row["tokens_per_second"]
            for row in rows
            if (row["sample"], row["codes"]) == (places[-1][0], options.codes[0])
        ]
        result = {
            "ratio": unfair[-1] / unfair[-len(contestants)], "rows": rows, "repeats": repeat, "sentences": len(test),
            "settings": {name: each.mixture.plain for name, each in contestants.items()}, "beams": options.beams,
            "entries": len(next(iter(contestants.values())).store), **common.environment(),
        }  # fmt: skip
        if options.json is not None:
            common.write_json(options.json, result)
    return result


def row_of(
    point: Point, contestant: Contestant, texts: dict[Point, list[str]], references: list[str]
) -> dict[str, Any]:
    """Scores of the translations at a point, compared with the first model alone; balance of its index."""
    scores = corpus_scores(texts[point], references)
    row = asdict(point) | {"bleu": scores.bleu.value, "chrf": scores.chrf.value}
    if point.sample is None:
        return row
    index = contestant.memory(point).index
    assert isinstance(index, FaissIndex)
    sizes = index.list_sizes()
    assert sizes is not None
    first = next(iter(texts.values()))
    delta = paired_bootstrap(first, texts[point], references).bleu
    return row | {"imbalance_factor": imbalance_factor(torch.from_numpy(sizes)), "to_base": asdict(delta)}


def report(rows: list[dict[str, Any]]) -> str:
    """A row for each point; Δ is from the first model alone."""
    found = [["model", "k-means on", "codes", "nprobe", "imbalance", "µs a query", "tokens/s", "BLEU", "Δ (95 %)"]]
    for row in rows:
        end = [f"{row['tokens_per_second']:.0f}", f"{row['bleu']:.1f}"]
        if row["sample"] is None:
            found.append([row["model"], "(no neighbors)", "", "", "", "", *end, ""])
            continue
        delta = row["to_base"]
        numbers = [str(row["nprobe"]), f"{row['imbalance_factor']:.1f}", f"{row['microseconds']:.0f}"]
        interval = f"{delta['delta']:+.1f} ({delta['low']:+.1f} to {delta['high']:+.1f})"
        found.append([row["model"], row["sample"], row["codes"], *numbers, *end, interval])
    return table(found)


def main(arguments: list[str] | None = None) -> None:
    """Measure the models that are named."""
    parser = study_parser(__doc__ or "")
    parser.add_argument("--nprobe", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--nlist", type=int, default=1024)
    parser.add_argument("--codes", nargs="+", default=["PQ64", "PQ64x4fs,Refine(SQfp16)"], help="of the lists' entries")
    parser.add_argument("--shortest", type=float, default=0.02, help="share of the keys in the other sample")
    parser.add_argument("--code-points", type=int, default=16384, help="keys that codes are trained on")
    parser.add_argument("--repeats", type=int, default=2)
    parser.set_defaults(only=["base", "fine-tuned, γ 0"], sentences=200)
    options = parser.parse_args(arguments)
    common.set_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            make_quick(options, Path(scratch))
            options.nlist, options.shortest, options.repeats = 16, 0.5, 1
            options.codes, options.code_points = options.codes[:1], 4096
            options.nprobe = [1, 8]
        result = measure(options)
    print(report(result["rows"]))


if __name__ == "__main__":
    main()
