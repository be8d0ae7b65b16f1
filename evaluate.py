"""Compare the plain model with kNN-MT: ``python evaluate.py --config configs/demo/evaluate.yaml``."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.cli import log_cut, run_script
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Provenance
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.comet import CometScorer, CometUnavailableError
from lightning_knnmt.evaluation.comparison import Contender, SystemResult, run_systems
from lightning_knnmt.evaluation.explanation import explain, explanation_lines
from lightning_knnmt.evaluation.plots import plot_list_sizes
from lightning_knnmt.evaluation.report import (
    environment,
    markdown_table,
    read_build,
    settings_line,
    significance_json,
    system_json,
    write_json,
    write_text,
)
from lightning_knnmt.evaluation.scores import paired_bootstrap
from lightning_knnmt.evaluation.tuning import Tune, Tuning, check_apart, count_stored, tune
from lightning_knnmt.index.config import Device
from lightning_knnmt.index.memory import KnnSearch, KnnSettings, open_search
from lightning_knnmt.storage.files import file_sha256
from lightning_knnmt.timing import peak_memory_mb

log = logging.getLogger("lightning_knnmt.evaluate")


def evaluate(
    backbone: KeyedModel,
    datastore: Path,
    test: CorpusFile,
    out: Path,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    tuning: Tune | None = None,
    others: dict[str, Contender] | None = None,
    decoding: Decoding = Decoding(),
    repeats: int = 3,
    seed: int = 1,
    comet: str | None = None,
    examples: int = 3,
    index_device: Device = "cpu",
) -> None:
    """Translate a test split with the plain model and with kNN, and report quality and speed of both.

    Args:
        backbone: The model, such as --backbone.model models/demo-de-en; --backbone.help lists its other options.
        datastore: Folder of a datastore built from that model.
        test: The test split.
        out: Folder for results.json, results.md, translate.yaml and cluster_sizes.png.
        index: Name of the datastore's index.
        knn: Settings of the search, where they are not tuned.
        tuning: Choose the settings on a validation split first; --tuning.help lists its options.
        others: Other models with datastores of their own, compared with the first in the same run: NAME is reported as
            the systems NAME and knn_NAME.
        decoding: Beam size, batch size and length.
        repeats: Timed repeats of each system, after one warm-up.
        seed: Seed of each run, in case decoding samples.
        comet: Hub name or checkpoint of a COMET model.
        examples: How many of the translations that kNN improves most are shown with their neighbors.
        index_device: Where indexes are searched: `cpu`; `gpu`: divided between all GPUs; `auto`: there where FAISS can.
    """
    pairs = list(read_pairs(test))
    validation = [] if tuning is None else list(read_pairs(tuning.validation))
    check_apart(validation, pairs)
    scorer, no_comet = _comet_scorer(comet)
    with ExitStack() as stack:
        searches = {"knn": stack.enter_context(open_search(backbone, datastore, index, device=index_device))}
        for name, other in (others or {}).items():
            searches[f"knn_{name}"] = stack.enter_context(
                open_search(_like(backbone, other), other.datastore, other.index, device=index_device)
            )
        search = searches["knn"]
        stored = count_stored(search.datastore, {"test": pairs, "validation": validation})
        tunings = {} if tuning is None else {n: tune(s, validation, tuning.grid, decoding) for n, s in searches.items()}
        settings = {name: tunings[name].best if tunings else knn for name in searches}
        knn = settings["knn"]
        log.info("chosen: %s", "; ".join(f"{name} {chosen}" for name, chosen in settings.items()))
        translators: dict[str, Translator] = {}
        for name, each in searches.items():
            translators[_plain_name(name)] = Translator(each.backbone, decoding)
            translators[name] = each.translator(settings[name], decoding)
        systems = run_systems(translators, pairs, repeats, seed)
        peak_memory = peak_memory_mb()
        references = [pair.tgt for pair in pairs]
        base = systems["base"].texts
        significance = {
            name: paired_bootstrap(base, systems[name].texts, references) for name in systems if name != "base"
        }
        if scorer is not None:
            sources = [pair.src for pair in pairs]
            for name, result in systems.items():
                systems[name] = replace(result, comet=scorer.score(sources, result.texts, references))
        details = {name: _search_json(each, settings[name], tunings.get(name)) for name, each in searches.items()}
        results = {
            "systems": {name: system_json(result) | details.get(name, {}) for name, result in systems.items()},
            "significance": significance_json(significance),
            "comet": {"model": comet, "missing": no_comet},
            **{part: details["knn"][part] for part in ("index", "build", "tuning")},
            "settings": {
                "knn": asdict(knn),
                "grid": None if tuning is None else asdict(tuning.grid),
                "decoding": asdict(decoding),
                "repeats": repeats,
                "seed": seed,
                "test": _split_json(test, pairs),
                "validation": None if tuning is None else _split_json(tuning.validation, validation),
                "model": asdict(Provenance.of(backbone)) | {"dtype": _dtype(backbone)},
                "datastore": {"folder": datastore, "index": index, "index_device": search.index.device}
                | asdict(search.datastore.manifest),
                "sources_in_datastore": stored,
                **environment(backbone.device),
            },
            "cut_texts": backbone.cut_texts,
            "peak_memory_mb": peak_memory,
        }
        table = markdown_table(systems, significance, {name: each.report for name, each in searches.items()})
        note = "" if comet is None or no_comet is None else f"\n\nNo COMET scores: {no_comet}"
        write_json(out / "results.json", results)
        write_text(out / "results.md", f"{table}\n\n{settings_line(results)}{note}")
        write_text(out / "translate.yaml", translate_config(backbone, datastore, index, knn, decoding))
        sizes = {name: each.index.list_sizes() for name, each in searches.items()}
        if lists := {f"{name}: {searches[name].report.factory}": n for name, n in sizes.items() if n is not None}:
            plot_list_sizes(lists, out / "cluster_sizes.png")
        _show_examples(search, knn, decoding, pairs, systems, examples)
    log_cut(backbone)
    log.info("\n%s\n\n%s\n\nwritten to %s", table, settings_line(results) + note, out / "results.json")


def _like(backbone: KeyedModel, other: Contender) -> KeyedModel:
    """Another model, read in the same way."""
    return load_model(
        other.model, backbone.key_type, backbone.src_lang, backbone.tgt_lang, _dtype(backbone), str(backbone.device),
        backbone.src_prefix,
    )  # fmt: skip


def _plain_name(name: str) -> str:
    """The plain model of a system with neighbors."""
    return "base" if name == "knn" else name.removeprefix("knn_")


def _search_json(search: KnnSearch, settings: KnnSettings, tuned: Tuning | None) -> dict[str, Any]:
    """What a system with neighbors searches, and how it was chosen."""
    build = read_build(search.datastore.folder)
    return {
        "knn": asdict(settings),
        "index": asdict(search.report),
        "build": {"encode": build["encode"], "index": build["indexes"].get(search.index_name)},
        "tuning": None if tuned is None else tuned.to_json(),
    }


def _comet_scorer(model: str | None) -> tuple[CometScorer | None, str | None]:
    """The scorer, loaded before hours of decoding, or the reason why there is none."""
    if model is None:
        return None, "not asked for"
    try:
        return CometScorer(model), None
    except (CometUnavailableError, ImportError) as error:
        log.warning("no COMET scores: %s", error)
        return None, str(error)


def _split_json(corpus: CorpusFile, pairs: Sequence[Pair]) -> dict[str, Any]:
    files = [path for path in (corpus.path, corpus.tgt_path) if path is not None]
    return asdict(corpus) | {"sentences": len(pairs), "sha256": [file_sha256(path) for path in files]}


def _dtype(backbone: KeyedModel) -> Any:
    return str(backbone.model.dtype).removeprefix("torch.")


def _show_examples(
    search: KnnSearch,
    knn: KnnSettings,
    decoding: Decoding,
    pairs: Sequence[Pair],
    systems: dict[str, SystemResult],
    examples: int,
) -> None:
    for number in _most_improved(systems, [pair.tgt for pair in pairs])[:examples]:
        explanation = explain(search, knn, decoding, pairs[number].src)
        log.info("\nsource     %s", pairs[number].src)
        log.info("reference  %s", pairs[number].tgt)
        log.info("base       %s", systems["base"].texts[number])
        log.info("kNN        %s", explanation.text)
        log.info("\n".join(explanation_lines(explanation)))


def _most_improved(systems: dict[str, SystemResult], references: list[str]) -> list[int]:
    """Sentence numbers, those first whose chrF gained most by kNN."""
    from sacrebleu import sentence_chrf

    def gain(number: int) -> float:
        base, knn = (sentence_chrf(systems[name].texts[number], [references[number]]).score for name in ("base", "knn"))
        return knn - base

    return sorted(range(len(references)), key=gain, reverse=True)


def translate_config(backbone: KeyedModel, datastore: Path, index: str, knn: KnnSettings, decoding: Decoding) -> str:
    """A configuration with which `translate.py` uses the same settings."""
    inputs = {name: getattr(backbone, name) for name in ("src_lang", "tgt_lang", "src_prefix")}
    config = {
        "backbone": {"model": backbone.name, "key_type": backbone.key_type, **inputs, "dtype": _dtype(backbone)},
        "datastore": str(datastore),
        "index": index,
        "knn": asdict(knn),
        "decoding": asdict(decoding),
    }
    return yaml.safe_dump(config, sort_keys=False).strip()


if __name__ == "__main__":
    run_script(evaluate)
