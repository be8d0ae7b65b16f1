"""Compare the plain model with kNN-MT: ``python evaluate.py --config configs/demo/evaluate.yaml``."""

import logging
import resource
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import yaml

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore.manifest import library_versions
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.comet import CometScorer, CometUnavailableError
from lightning_knnmt.evaluation.comparison import SystemResult, run_systems
from lightning_knnmt.evaluation.report import markdown_table, significance_json, system_json, write_json
from lightning_knnmt.evaluation.scores import paired_bootstrap
from lightning_knnmt.evaluation.tuning import Grid, tune
from lightning_knnmt.explanation import explain, explanation_lines
from lightning_knnmt.plots import plot_list_sizes
from lightning_knnmt.search import KnnSettings, open_search

log = logging.getLogger("lightning_knnmt.evaluate")


@dataclass(frozen=True)
class Tune:
    """Tuning before the comparison.

    Attributes:
        validation: The validation split.
        grid: The settings to choose from.
    """

    validation: CorpusFile
    grid: Grid = Grid()


def evaluate(
    backbone: Backbone,
    datastore: Path,
    test: CorpusFile,
    out: Path,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    tuning: Tune | None = None,
    decoding: Decoding = Decoding(),
    repeats: int = 3,
    comet: str | None = None,
    examples: int = 3,
) -> None:
    """Translate a test split with the plain model and with kNN, and report quality and speed of both.

    Args:
        backbone: The model.
        datastore: Folder of a datastore built from that model.
        test: The test split.
        out: Folder for results.json, results.md, translate.yaml and cluster_sizes.png.
        index: Name of the datastore's index.
        knn: Settings of the search, where they are not tuned.
        tuning: Choose the settings on a validation split first.
        decoding: Beam size, batch size and length.
        repeats: Timed repeats of each system, after one warm-up.
        comet: Hub name or checkpoint of a COMET model.
        examples: Translations that are shown with their neighbors.
    """
    pairs = list(read_pairs(test))
    results: dict[str, object] = {}
    with open_search(backbone, datastore, index) as search:
        if tuning is not None:
            tuned = tune(search, list(read_pairs(tuning.validation)), tuning.grid, decoding)
            knn = tuned.best
            results["tuning"] = tuned.to_json()
            log.info("chosen: %s", knn)
        systems = run_systems(
            {"base": Translator(backbone, decoding), "knn": search.translator(knn, decoding)}, pairs, repeats
        )
        systems = _with_comet(systems, comet, [p.src for p in pairs], [p.tgt for p in pairs])
        references = [pair.tgt for pair in pairs]
        significance = {"knn": paired_bootstrap(systems["base"].texts, systems["knn"].texts, references)}
        sizes = search.index.list_sizes()
        if sizes is not None:
            plot_list_sizes({search.report.factory: sizes}, out / "cluster_sizes.png")
        table = markdown_table(systems, significance)
        results |= {
            "systems": {name: system_json(result) for name, result in systems.items()},
            "significance": significance_json(significance),
            "index": asdict(search.report),
            "settings": {
                "knn": asdict(knn),
                "decoding": asdict(decoding),
                "test": {"file": str(test.path), "sentences": len(pairs)},
                "datastore": asdict(search.datastore.manifest),
                "device": str(backbone.device),
                "libraries": library_versions(),
            },
            "peak_memory_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        }
        write_json(out / "results.json", results)
        (out / "results.md").write_text(f"{table}\n", encoding="utf-8")
        _write_translate_config(out / "translate.yaml", backbone, datastore, index, knn, decoding)
        for number in _most_improved(systems, references)[:examples]:
            log.info("\nsource     %s", pairs[number].src)
            log.info("reference  %s", pairs[number].tgt)
            log.info("base       %s", systems["base"].texts[number])
            log.info("kNN        %s", systems["knn"].texts[number])
            explained = explain(search, knn, pairs[number].src, systems["knn"].texts[number])
            log.info("\n".join(explanation_lines(explained)))
        log.info("\n%s\n\nwritten to %s", table, out / "results.json")


def _with_comet(
    systems: dict[str, SystemResult], model: str | None, sources: list[str], references: list[str]
) -> dict[str, SystemResult]:
    if model is None:
        return systems
    try:
        scorer = CometScorer(model)
        return {name: replace(r, comet=scorer.score(sources, r.texts, references)) for name, r in systems.items()}
    except (CometUnavailableError, ImportError) as error:
        log.warning("no COMET scores: %s", error)
        return systems


def _most_improved(systems: dict[str, SystemResult], references: list[str]) -> list[int]:
    """Sentence numbers, those first whose chrF gained most by kNN."""
    from sacrebleu import sentence_chrf

    def gain(number: int) -> float:
        base, knn = (sentence_chrf(systems[name].texts[number], [references[number]]).score for name in ("base", "knn"))
        return knn - base

    return sorted(range(len(references)), key=gain, reverse=True)


def _write_translate_config(
    path: Path, backbone: Backbone, datastore: Path, index: str, knn: KnnSettings, decoding: Decoding
) -> None:
    """A configuration with which `translate.py` uses the chosen settings."""
    languages = {"src_lang": backbone.src_lang, "tgt_lang": backbone.tgt_lang}
    config = {
        "backbone": {"model": backbone.name, "key_type": backbone.key_type, **languages},
        "datastore": str(datastore),
        "index": index,
        "knn": asdict(knn),
        "decoding": asdict(decoding),
    }
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


if __name__ == "__main__":
    run_script(evaluate)
