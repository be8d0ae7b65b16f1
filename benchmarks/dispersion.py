"""What dispersion fine-tuning does to keys, index and translations: ``python benchmarks/dispersion.py lists``.

States that enter the last feed-forward layer are stored once; each variant is fine-tuned on them (``train``), its keys
are put into lists by every metric, from a uniform sample and from the shortest sentences alone (``lists``), and its
datastore is made and translations scored (``score``), each once: what is in `--out` is kept. ``ratio`` is the imbalance
factor of the base model over that of the last variant where the base model's is largest.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import common
import lightning as L
import torch

from lightning_knnmt import dispersion as losses
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.building.config import RekeyConfig
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.rekey import rekey
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.dispersion.functional.directions import directions
from lightning_knnmt.evaluation.report import table
from lightning_knnmt.evaluation.scores import corpus_scores, paired_bootstrap
from lightning_knnmt.evaluation.tuning import Grid, likelihoods
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.index.splitting import metric_centroids
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.settings import MixtureConfig
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.metric import Metric, seen_by
from lightning_knnmt.training import ExportBackbone, IndexHealth, Schedule, TranslationModule
from lightning_knnmt.training.datamodule import TranslationDataModule
from lightning_knnmt.training.index_health import index_health
from lightning_knnmt.training.module import Trainable

REGULARISERS: dict[str, losses.Dispersion] = {
    "sliced": losses.SlicedDispersion(),
    "sliced, 4 circles": losses.SlicedDispersion(circles=4),
    "axis-aligned": losses.AxisAlignedSlicedDispersion(),
    "mean resultant length": losses.MeanResultantLength(),
    "MHE": losses.HypersphericalEnergy(max_points=1024),
    "MMD": losses.KernelDispersion(max_points=1024),
    "KoLeo": losses.KoLeo(max_points=1024),
    "MMA": losses.MaximumMinimumAngle(max_points=1024),
    "MMCS": losses.MaximumMeanCosine(max_points=1024),
    "Lloyd": losses.Lloyd(samples=8192),
}


METRICS: dict[str, tuple[Metric, bool]] = {  # [label -> metric, whether centroids have unit norm]
    "l2": ("l2", False),
    "ip, any centroids": ("ip", False),
    "ip, unit centroids": ("ip", True),
    "cos, unit centroids": ("cos", True),
}


@dataclass(frozen=True)
class Variant:
    """One model of the study.

    Attributes:
        regulariser: Of `REGULARISERS`; None: the base model as it is.
        gamma: γ; 0: fine-tuned without dispersion.
        trainable: What is fine-tuned.
    """

    regulariser: str | None
    gamma: float = 0.0
    trainable: Trainable = "last_block"

    @property
    def name(self) -> str:
        """Folder and row of the table."""
        if self.regulariser is None:
            return "base"
        kind = "" if self.trainable == "last_block" else f", {self.trainable}"
        return f"{self.regulariser if self.gamma else 'fine-tuned'}, γ {self.gamma:g}{kind}"


VARIANTS = [
    Variant(None),
    Variant("sliced", 0),
    *(
        Variant(regulariser, gamma)
        for regulariser in REGULARISERS
        for gamma in ((0.1, 1, 10) if regulariser == "sliced" else (1, 10))
    ),
    Variant("sliced", 1, "adapters"),
]


class BothSplits(TranslationDataModule):
    """Has the training split at hand in validation, too, where its keys are searched."""

    def setup(self, stage: str) -> None:
        """Read both splits."""
        super().setup("fit")


def states_of(options: argparse.Namespace, split: str) -> Path:
    """The datastore of a split's states, built unless it is there."""
    folder = (options.states or options.out / "states") / split
    below = load_model(str(options.model), key_type="ffn_residual")
    build_datastore(below, DatastoreConfig(folder, CorpusFile(options.data / f"{split}.jsonl")))
    return folder


def fine_tune(variant: Variant, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant as `train.py fit --config configs/dispersion/stored_states.yaml` does, and export it."""
    L.seed_everything(options.seed)
    train, validation = (states_of(options, split) for split in ("train", "validation"))
    module = TranslationModule(
        BackboneConfig(options.model),
        Schedule(options.lr, options.steps // 10, options.steps, options.steps // 3),
        label_smoothing=options.label_smoothing,
        trainable=variant.trainable,
        dispersion=REGULARISERS[variant.regulariser or "sliced"],
        gamma=variant.gamma,
    )
    if options.freeze_projection:
        assert isinstance(module.backbone, PretrainedModel)
        module.backbone.output_projection.requires_grad_(False)
    data = BothSplits(train, validation, options.max_tokens, seed=options.seed)
    trainer = L.Trainer(
        max_steps=options.steps, gradient_clip_val=1.0, use_distributed_sampler=False, logger=False,
        enable_progress_bar=False, enable_checkpointing=False, val_check_interval=options.steps,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, enable_model_summary=False,
        callbacks=[IndexHealth(nlist=options.sample_nlist, picture=False), ExportBackbone(folder / "model", None)],
    )  # fmt: skip
    start = time.perf_counter()
    if variant.regulariser is None:
        trainer.validate(module, datamodule=data, verbose=False)
    else:
        trainer.fit(module, datamodule=data)
    values = {name.removeprefix("val/"): float(value) for name, value in trainer.callback_metrics.items()}
    values = {name: value for name, value in values.items() if not name.startswith("train/")}
    return {
        "variant": asdict(variant), "validation": values, "seconds": time.perf_counter() - start,
        "steps": options.steps, "lr": options.lr, "max_tokens": options.max_tokens, "seed": options.seed,
        "frozen_projection": options.freeze_projection,
    }  # fmt: skip


def model_of(variant: Variant, folder: Path, options: argparse.Namespace) -> PretrainedModel:
    """The model of a variant."""
    model = load_model(str(options.model if variant.regulariser is None else folder / "model"))
    assert isinstance(model, PretrainedModel)
    return model


@torch.inference_mode()
def keys_and_tokens(model: PretrainedModel, states: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys, rounded as in a datastore, and tokens of stored states, the longest sentences first."""
    with Datastore(states) as store:
        parts = [model.outputs(torch.from_numpy(part)).half().float() for part in store.key_chunks(16384)]
        return torch.cat(parts), torch.from_numpy(store.values).long()


def way_of(row: dict[str, Any]) -> tuple[str, int, str]:
    """Metric, number of lists, and what k-means was trained on."""
    return row["metric"], row["nlist"], row["sample"]


@torch.inference_mode()
def measure_lists(variant: Variant, folder: Path, options: argparse.Namespace) -> None:
    """Imbalance factor and codes scanned, by metric, number of lists, and what k-means is trained on, into lists.json.

    Figures are medians of several runs of k-means. Ways of making lists whose figures are there are not measured again.
    """
    path = folder / "lists.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["lists"] if path.exists() else []
    samples = ["uniform", *(f"shortest {share:.0%}" for share in options.shortest)]
    there = {way_of(row) for row in rows if len(row["imbalance_factors"]) >= options.kmeans}
    ways = [
        (metric, nlist, sample)
        for metric, nlist, sample in product(options.metrics, options.nlist, samples)
        if (metric, nlist, sample) not in there
    ]
    if not ways:
        return
    model = model_of(variant, folder, options)
    keys, tokens = keys_and_tokens(model, states_of(options, "train"))
    queries, _ = keys_and_tokens(model, states_of(options, "validation"))
    generator = torch.Generator().manual_seed(options.seed)
    queries = queries[torch.randperm(len(queries), generator=generator)[:2000]]
    order = torch.randperm(len(keys), generator=generator)
    shares = dict(zip(samples[1:], options.shortest, strict=True))
    for label, nlist, name in ways:
        sample = keys[-int(shares[name] * len(keys)) :] if name in shares else keys[order[: options.per_list * nlist]]
        if len(sample) < nlist:
            continue
        metric, unit = METRICS[label]
        seen = seen_by(sample, metric).contiguous().numpy()
        health = [
            index_health(keys, tokens, queries, torch.from_numpy(centroids), options.nprobe, metric=metric)
            for seed in range(options.seed, options.seed + options.kmeans)
            for centroids in [metric_centroids(seen, nlist, metric, unit, seed)]
        ]
        row: dict[str, Any] = {"metric": label, "nlist": nlist, "sample": name, "training_points": len(sample)}
        for key in health[0].values:
            row[key] = statistics.median(float(each.values[key]) for each in health)
        row["codes_scanned"] /= len(keys)
        row["imbalance_factors"] = [float(each.values["imbalance_factor"]) for each in health]
        rows = [each for each in rows if way_of(each) != way_of(row)] + [row]
        result = {"variant": asdict(variant), "keys": len(keys), "nprobe": options.nprobe, "lists": rows}
        common.write_json(path, result | common.environment())


def score(
    model: KeyedModel, memory: DatastoreMemory, test: list[Any], validation: list[Any], nprobe: int, decoding: Decoding
) -> dict[str, Any]:
    """Translations without and with neighbors; k, λ and T by the likelihood of the validation split."""
    grid = Grid(nprobe=[nprobe], max_tokens=4096)
    candidates, *_ = likelihoods(model, memory, MixtureConfig.of(), validation, grid)
    best = max(candidates, key=lambda candidate: candidate.log_likelihood)
    sources, references = [pair.src for pair in test], [pair.tgt for pair in test]
    found: dict[str, Any] = {"settings": best.mixture.plain, "validation_log_likelihood": best.log_likelihood}
    mixtures: dict[str, Mixture | PlainModel] = {"base": PlainModel(), "knn": best.mixture.open(model, memory)}
    for name, mixture in mixtures.items():
        texts = Translator(model, mixture, decoding).translate(sources).texts
        scores = corpus_scores(texts, references)
        found[name] = {"bleu": scores.bleu.value, "chrf": scores.chrf.value, "texts": texts}
    return found


def score_store(variant: Variant, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Build a variant's datastore and translate with it."""
    backbone = model_of(variant, folder, options)
    rekey(backbone, RekeyConfig(states_of(options, "train"), folder / "store"))
    test, validation = (read_split(options.data / f"{part}.jsonl") for part in ("test", "validation"))
    test, validation = test[: options.sentences], validation[: options.sentences]
    decoding = Decoding(beams=options.beams, batch_size=64, max_new_tokens=options.max_new_tokens)
    with Datastore(folder / "store") as store:
        report = build_index(store, IndexConfig(options.factory))
        scores = score(backbone, DatastoreMemory(store, open_index(store)), test, validation, options.nprobe, decoding)
        unit = directions(torch.from_numpy(store.sample_keys(50_000)))
    return {"index": asdict(report), "mean_resultant_length": float(unit.mean(0).norm())} | scores


def trained_table(results: dict[str, dict[str, Any]]) -> str:
    """What validation shows of all variants: likelihood against spread."""
    rows = [
        [
            "model",
            "loss per token",
            "with neighbors",
            "imbalance",
            "codes scanned",
            "mean resultant length",
            "training, s",
        ]
    ]
    for name, result in results.items():
        values = result["validation"]
        columns = ("loss", "knn_loss", "imbalance_factor", "codes_scanned", "mean_resultant_length")
        rows.append([name, *(f"{values[column]:.3f}" for column in columns), f"{result['seconds']:.0f}"])
    return table(rows)


def rows_by_way(result: dict[str, Any]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Rows of lists by metric, number of lists, and what k-means was trained on, sorted."""
    labels = list(METRICS)
    rows = sorted(
        result["lists"],
        key=lambda row: (labels.index(row["metric"]), row["nlist"], row["sample"] != "uniform", row["sample"]),
    )
    return {way_of(row): row for row in rows}


def lists_table(results: dict[str, dict[str, Any]]) -> str:
    """Imbalance factor, its range where k-means ran more than once, and share of the keys that a query scans."""

    def cell(row: dict[str, Any] | None) -> str:
        if row is None:
            return ""
        factors = row["imbalance_factors"]
        spread = f"{min(factors):.1f} to {max(factors):.1f}; " if len(factors) > 1 else ""
        return f"{row['imbalance_factor']:.2f} ({spread}{row['codes_scanned']:.1%})"

    by_way = {name: rows_by_way(result) for name, result in results.items()}
    rows = [["metric", "lists", "k-means on", *results]]
    for way in max(by_way.values(), key=len):
        found = [each.get(way) for each in by_way.values()]
        rows.append([way[0], f"{way[1]:,}", way[2], *map(cell, found)])
    return table(rows)


def gain(results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The imbalance of the base model over that of the last variant, where the base model's is largest."""
    base, last = rows_by_way(results[Variant(None).name]), rows_by_way(list(results.values())[-1])
    worst = max(base.keys() & last.keys(), key=lambda way: (base[way]["imbalance_factor"], way))
    before, after = base[worst]["imbalance_factor"], last[worst]["imbalance_factor"]
    where = dict(zip(("metric", "nlist", "sample"), worst, strict=True))
    return {"ratio": before / after, "base": before, "dispersed": after, "variant": list(results)[-1], **where}


def scored_table(results: dict[str, dict[str, Any]], references: list[str]) -> str:
    """Translation quality; Δ is from fine-tuning without dispersion (else the first row), with neighbors each."""
    rows = [["model", "BLEU", "chrF", "kNN BLEU", "kNN chrF", "Δ kNN BLEU (95 %)", "imbalance", "homogeneity", "MRL"]]
    reference = results.get(Variant("sliced", 0).name) or next(iter(results.values()))
    for name, result in results.items():
        plain, knn, index = result["base"], result["knn"], result["index"]
        bleu = paired_bootstrap(reference["knn"]["texts"], knn["texts"], references).bleu
        interval = f"{bleu.delta:+.1f} ({bleu.low:+.1f} to {bleu.high:+.1f})" if result is not reference else ""
        rows.append(
            [
                name, *(f"{part[metric]:.1f}" for part in (plain, knn) for metric in ("bleu", "chrf")), interval,
                f"{index['imbalance_factor']:.2f}", f"{index['homogeneity']:.3f}",
                f"{result['mean_resultant_length']:.2f}",
            ]
        )  # fmt: skip
    return table(rows)


def once(path: Path, work: Callable[[], dict[str, Any]]) -> None:
    """Do some work unless its result is there."""
    if not path.exists():
        common.write_json(path, work() | common.environment())


def found(options: argparse.Namespace, file: str) -> dict[str, dict[str, Any]]:
    """The results that are there, in the order of the variants."""
    paths = {variant.name: options.out / variant.name / file for variant in VARIANTS}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items() if path.exists()}


def study_parser(description: str) -> argparse.ArgumentParser:
    """Options of the models of the study: where they are, and how those that are not there are trained."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [variant.name for variant in VARIANTS]
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"))
    parser.add_argument("--data", type=Path, default=Path("data/libreoffice_help"))
    parser.add_argument("--states", type=Path, help="states of the splits; OUT/states by default")
    parser.add_argument("--only", nargs="+", choices=names, help="names of variants; all by default", metavar="NAME")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="0 for a model that was distilled")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--freeze-projection", action="store_true", help="leave the output projection as it is")
    parser.add_argument("--sample-nlist", type=int, default=128, help="lists of the keys of the validation split")
    parser.add_argument("--per-list", type=int, default=20, help="training keys for each list, of a uniform sample")
    parser.add_argument("--sentences", type=int, help="of the test and validation splits to score; all by default")
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--quick", action="store_true", help="few pairs, steps and lists, under a minute")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    return parser


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked for, and tabulate all that is there."""
    parser = study_parser(__doc__ or "")
    parser.add_argument("stage", nargs="?", default="lists", choices=("train", "lists", "score"), help="how far to go")
    parser.add_argument("--factory", default="auto", help="of the datastores' indexes")
    parser.add_argument("--nprobe", type=int, default=8)
    parser.add_argument("--nlist", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS), help="of the lists")
    parser.add_argument("--kmeans", type=int, default=1, help="runs of k-means, whose median is taken", metavar="RUNS")
    parser.add_argument("--shortest", type=float, nargs="*", default=[0.01, 0.02, 0.06], help="shares of the keys")
    options = parser.parse_args(arguments)
    common.set_threads(options.threads)
    with tempfile.TemporaryDirectory() as scratch:
        if options.quick:
            make_quick(options, Path(scratch))
            options.nlist, options.shortest = [32], [0.05]
            options.only = options.only or ["base", "MHE, γ 10"]
        study(options)


def make_quick(options: argparse.Namespace, scratch: Path) -> None:
    """Settings of a run that shows that everything runs; its figures say little."""
    data = scratch / "data"
    data.mkdir()
    for split, most in (("train", 240), ("validation", 40), ("test", 8)):
        lines = (options.data / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (data / f"{split}.jsonl").write_text("".join(lines[:: max(1, len(lines) // most)][:most]), encoding="utf-8")
    options.out, options.data, options.steps, options.max_tokens = scratch / "out", data, min(options.steps, 40), 200
    options.freeze_projection = True
    options.sample_nlist = 4


def trained_folder(variant: Variant, options: argparse.Namespace) -> Path:
    """The folder of a variant's model, which is trained unless it is there."""
    folder: Path = options.out / variant.name
    once(folder / "trained.json", partial(fine_tune, variant, folder, options))
    return folder


def study(options: argparse.Namespace) -> None:
    """Do what is missing, and tabulate all that is there."""
    for variant in VARIANTS:
        if options.only is None or variant.name in options.only:
            folder = trained_folder(variant, options)
            if options.stage != "train":
                measure_lists(variant, folder, options)
            if options.stage == "score":
                once(folder / "scored.json", partial(score_store, variant, folder, options))
    print(trained_table(found(options, "trained.json")))
    if lists := found(options, "lists.json"):
        print(f"\n{lists_table(lists)}")
    if options.json is not None:
        trained = found(options, "trained.json")
        made = {"trained": trained, "lists": lists, **(gain(lists) if Variant(None).name in lists else {})}
        common.write_json(options.json, made | common.environment())
    if scored := found(options, "scored.json"):
        references = [pair.tgt for pair in read_split(options.data / "test.jsonl")][: options.sentences]
        print(f"\n{scored_table(scored, references)}")


if __name__ == "__main__":
    main()
