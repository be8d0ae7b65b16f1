"""What dispersion fine-tuning does to keys, index and translations: ``python benchmarks/dispersion.py score``.

Each variant is fine-tuned, its datastore built and its translations scored, once; what is in `--out` is kept, so
several processes may share the variants (`--only`). `benchmarks/search.py` measures the search in the stores.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import common
import lightning as L
import torch

from lightning_knnmt import dispersion as losses
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
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
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.settings import MixtureConfig
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.training import ExportBackbone, IndexHealth, Schedule, TranslationModule
from lightning_knnmt.training.datamodule import TranslationDataModule
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


def fine_tune(variant: Variant, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Train a variant as `train.py fit --config configs/dispersion/…` does, export it, and return its measures."""
    L.seed_everything(options.seed)
    module = TranslationModule(
        BackboneConfig(options.model),
        Schedule(options.lr, options.steps // 10, options.steps, options.steps // 3),
        label_smoothing=options.label_smoothing,
        trainable=variant.trainable,
        dispersion=REGULARISERS[variant.regulariser or "sliced"],
        gamma=variant.gamma,
    )
    data = TranslationDataModule(options.data / "train.jsonl", options.data / "validation.jsonl", options.max_tokens)
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
        "steps": options.steps, "lr": options.lr, "max_tokens": options.max_tokens,
    }  # fmt: skip


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
    backbone = load_model(str(options.model if variant.regulariser is None else folder / "model"))
    build_datastore(backbone, DatastoreConfig(folder / "store", CorpusFile(options.data / "train.jsonl")))
    test, validation = (read_split(options.data / f"{part}.jsonl") for part in ("test", "validation"))
    decoding = Decoding(beams=4, batch_size=64, max_new_tokens=options.max_new_tokens)
    with Datastore(folder / "store") as store:
        report = build_index(store, IndexConfig(options.factory))
        scores = score(backbone, DatastoreMemory(store, open_index(store)), test, validation, options.nprobe, decoding)
        unit = directions(torch.from_numpy(store.sample_keys(50_000)))
    return {"index": asdict(report), "mean_resultant_length": float(unit.mean(0).norm())} | scores


def trained_table(results: dict[str, dict[str, Any]]) -> str:
    """What validation shows of all variants: likelihood against spread."""
    rows = [["model", "loss per token", "imbalance", "homogeneity", "mean resultant length", "training, s"]]
    for name, result in results.items():
        values = result["validation"]
        columns = ("loss", "imbalance_factor", "homogeneity", "mean_resultant_length")
        rows.append([name, *(f"{values[column]:.3f}" for column in columns), f"{result['seconds']:.0f}"])
    return table(rows)


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


def main(arguments: list[str] | None = None) -> None:
    """Do what is asked for, and tabulate all that is there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("train", "score"), help="fine-tune; or build datastores and translate")
    parser.add_argument("--out", type=Path, default=Path("runs/study"))
    parser.add_argument("--model", type=Path, default=Path("data/models/firefox-en-pt"))
    parser.add_argument("--data", type=Path, default=Path("data/libreoffice_help"))
    parser.add_argument("--only", nargs="*", help="names of variants; all by default", metavar="NAME")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--label-smoothing", type=float, default=0.0, help="0 for a model that was distilled")
    parser.add_argument("--max-tokens", type=int, default=1024)
    parser.add_argument("--factory", default="auto", help="of the datastores' indexes")
    parser.add_argument("--sample-nlist", type=int, default=128, help="lists of the keys of the validation split")
    parser.add_argument("--nprobe", type=int, default=8)
    parser.add_argument("--max-new-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args(arguments)
    common.set_threads(options.threads)
    names = [variant.name for variant in VARIANTS]
    if unknown := set(options.only or []) - set(names):
        parser.error(f"--only names {sorted(unknown)}, expected some of {names}")
    for variant in VARIANTS:
        if options.only is None or variant.name in options.only:
            folder = options.out / variant.name
            once(folder / "trained.json", partial(fine_tune, variant, folder, options))
            if options.stage == "score":
                once(folder / "scored.json", partial(score_store, variant, folder, options))
    print(trained_table(found(options, "trained.json")))
    if scored := found(options, "scored.json"):
        references = [pair.tgt for pair in read_split(options.data / "test.jsonl")]
        print(f"\n{scored_table(scored, references)}")


if __name__ == "__main__":
    main()
