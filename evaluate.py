"""Compare the plain model with kNN-MT: ``python evaluate.py --config configs/demo/evaluate.yaml``."""

import logging
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_at_least, check_folder, refuse_existing
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Provenance
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.ensemble import EnsembleTranslator, check_same_tokens
from lightning_knnmt.decoding.together import SharedTranslator
from lightning_knnmt.evaluation.comet import CometScorer, CometUnavailableError
from lightning_knnmt.evaluation.comparison import Contender, SystemResult, run_systems
from lightning_knnmt.evaluation.explanation import explain, explanation_lines
from lightning_knnmt.evaluation.online import OnlineTranslator
from lightning_knnmt.evaluation.plots import plot_list_sizes
from lightning_knnmt.evaluation.report import (
    environment,
    markdown_table,
    read_build,
    settings_line,
    significance_json,
    system_json,
    systems_lines,
)
from lightning_knnmt.evaluation.scores import paired_bootstrap
from lightning_knnmt.evaluation.tuning import Tune, Tuning, check_apart, count_stored, tune
from lightning_knnmt.index.config import SearchDevice
from lightning_knnmt.index.opening import load_index
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import Gate
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.knn.pooled import PooledMemory
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.loading import EnsembleMember, check_ensemble, check_memory, check_pooled
from lightning_knnmt.memory import DatastoreMemory, open_memory, open_pooled
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.files import file_sha256, write_json, write_text
from lightning_knnmt.storage.ranks import Processes, Ranks
from lightning_knnmt.timing import peak_memory_mb

log = logging.getLogger("lightning_knnmt.evaluate")


@dataclass(frozen=True)
class System:
    """A model with a memory of its own, and how neighbors are mixed in."""

    model: KeyedModel
    memory: DatastoreMemory | PairMemory
    index: str
    mixture: MixtureConfig
    tuning: Tuning | None = None
    pooled: PooledMemory | None = None

    @property
    def searched(self) -> Memory:
        """What is searched: the memory, or several of which it is the first."""
        return self.memory if self.pooled is None else self.pooled


def evaluate(
    backbone: BackboneConfig,
    test: CorpusFile,
    out: Path,
    datastore: Path | None = None,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    retriever: Retriever | None = None,
    combiner: Combiner | None = None,
    gate: Gate | None = None,
    tuning: Tune | None = None,
    others: dict[str, Contender] | None = None,
    decoding: Decoding = Decoding(),
    repeats: int = 3,
    seed: int = 1,
    overwrite: bool = False,
    comet: str | None = None,
    examples: int = 3,
    index_device: SearchDevice = "cpu",
    mmap: bool = False,
    translation_memory: CorpusFile | None = None,
    online: bool = False,
    checksums: bool | None = None,
    pooled_with: list[Path] | None = None,
    ensemble_with: list[EnsembleMember] | None = None,
    processes: Processes = Processes(),
) -> None:
    """Translate a test split with the plain model and with kNN, and report quality and speed of both.

    Args:
        backbone: The model, such as --backbone.model data/models/firefox-en-pt, and how it is loaded.
        test: The test split.
        out: Folder for results.json, results.md, translate.yaml and cluster_sizes.png.
        datastore: Folder of a datastore built from that model.
        index: Name of the datastore's index.
        knn: The usual search and mixture, where no class is chosen below; what is tuned replaces it.
        retriever: Where neighbors come from, by class_path and init_args.
        combiner: How they are mixed in, by class_path and init_args.
        gate: Which rows search, by class_path and init_args.
        tuning: Choose the options on a validation split first; --tuning.help lists its options.
        others: Other models with datastores of their own, compared with the first in the same run: NAME is reported as
            the systems NAME and knn_NAME.
        decoding: Beam size, batch size and length.
        repeats: Timed repeats of each system, after one warm-up.
        seed: Seed of each run, in case decoding samples.
        overwrite: Replace the results that `out` holds; otherwise they are an error.
        comet: Hub name or checkpoint of a COMET model.
        examples: How many of the translations that kNN improves most are shown with their neighbors.
        index_device: Where indexes are searched: `cpu`; `gpu`: divided between all GPUs; `auto`: there where FAISS can;
            `torch_keys`: among all stored keys, by torch on the model's device; `torch_codes`: among all their codes.
        mmap: Leave the entries of indexes on the disk, for those that are larger than memory.
        translation_memory: Pairs as they stand, for a retriever that needs no stored keys; in place of a datastore.
        online: Compare with a third system, knn_online, which learns the reference of every sentence after translating
            it, one sentence at a time; with a translation memory only.
        checksums: Compare the datastore's bytes with their checksums first; null: those of files up to 256 MB in all.
        pooled_with: Folders of further datastores of the model, searched together with the first by indexes of the same
            name.
        ensemble_with: Further models, each with `backbone`, `datastore` and a `weight`, for an ensemble with the first:
            they are reported as model_2, knn_model_2 and so on, and all together as ensemble and knn_ensemble.
        processes: Processes that share the sentences and search together, each with its part of an index that was
            built with `layout: shards`.
    """
    check_at_least(1, repeats=repeats)
    check_at_least(0, examples=examples)
    check_folder(out=out)
    refuse_existing(overwrite, out=out / "results.json")
    chosen = MixtureConfig.of(knn, retriever, combiner, gate)
    check_memory(datastore, translation_memory, retriever)
    check_pooled(pooled_with, datastore, processes.devices * processes.num_nodes > 1)
    check_ensemble(ensemble_with, decoding, processes.devices * processes.num_nodes > 1)
    members = {f"model_{number}": member for number, member in enumerate(ensemble_with or [], 2)}
    _check_systems(datastore, translation_memory, others, members, online, processes)
    stored_pairs = None if translation_memory is None else list(read_pairs(translation_memory))
    pairs = list(read_pairs(test))
    validation = [] if tuning is None else list(read_pairs(tuning.validation))
    check_apart(validation, pairs)
    scorer, no_comet = _comet_scorer(comet)
    contenders = {"knn": (backbone, datastore, index)} | {
        f"knn_{name}": (replace(backbone, model=other.model), other.datastore, other.index)
        for name, other in (others or {}).items()
    }
    contenders |= {f"knn_{name}": (each.backbone, each.datastore, each.index) for name, each in members.items()}
    with ExitStack() as stack:
        models = {name: config.load() for name, (config, *_) in contenders.items()}
        if members:
            check_same_tokens([models[name] for name in ("knn", *map("knn_{}".format, members))])
        ranks = stack.enter_context(processes.start(models["knn"]))
        systems: dict[str, System] = {}
        for name, (_, folder, index_name) in contenders.items():
            memory: DatastoreMemory | PairMemory
            if folder is None:
                memory = PairMemory(models[name], stored_pairs or [])
            else:
                memory = stack.enter_context(
                    open_memory(folder, index_name, mmap, index_device, ranks, checksums=checksums)
                )
            memory.check(models[name])
            member = members.get(name.removeprefix("knn_"))
            mixture = chosen if member is None else member.chosen
            systems[name] = System(models[name].to(models["knn"].device), memory, index_name, mixture)
        if isinstance(first_memory := systems["knn"].memory, DatastoreMemory):
            pooled = open_pooled(first_memory, pooled_with or [], index, mmap, index_device, checksums)
            if isinstance(pooled, PooledMemory):
                pooled.check(models["knn"])
                systems["knn"] = replace(systems["knn"], pooled=pooled)
        stored = count_stored(systems["knn"].searched, {"test": pairs, "validation": validation})
        if tuning is not None:
            for name, system in systems.items():
                tuned = tune(system.model, system.searched, system.mixture, validation, tuning.grid, decoding)
                systems[name] = replace(system, mixture=tuned.best, tuning=tuned)
        log.info("chosen: %s", "; ".join(f"{name} {system.mixture}" for name, system in systems.items()))
        translators = _translators(systems, decoding, ranks, pairs if online else [])
        if members:
            translators |= _ensembles(translators, members)
        results = run_systems(translators, pairs, repeats, seed)
        if ranks.rank > 0:
            return
        peak_memory = peak_memory_mb()
        references = [pair.tgt for pair in pairs]
        base = results["base"].texts
        significance = {
            name: paired_bootstrap(base, results[name].texts, references) for name in results if name != "base"
        }
        if scorer is not None:
            sources = [pair.src for pair in pairs]
            for name, result in results.items():
                results[name] = replace(result, comet=scorer.score(sources, result.texts, references))
        details = {name: _system_details(system) for name, system in systems.items()}
        first = systems["knn"]
        content = {
            "systems": {name: system_json(result) | details.get(name, {}) for name, result in results.items()},
            "significance": significance_json(significance),
            "comet": {"model": comet, "missing": no_comet},
            **{part: details["knn"][part] for part in ("index", "build", "tuning")},
            "settings": {
                **{part: details["knn"][part] for part in ("knn", "mixture")},
                "grid": None if tuning is None else asdict(tuning.grid),
                "decoding": asdict(decoding),
                "repeats": repeats,
                "seed": seed,
                "test": _split_json(test, pairs),
                "validation": None if tuning is None else _split_json(tuning.validation, validation),
                "model": asdict(Provenance.of(first.model)) | {"dtype": first.model.dtype},
                "datastore": _datastore_json(first),
                "pooled_with": pooled_with,
                "ensemble_with": {
                    f"knn_{name}": _member_config(member, systems[f"knn_{name}"]) for name, member in members.items()
                },
                "translation_memory": None
                if translation_memory is None
                else _split_json(translation_memory, stored_pairs or []),
                "sources_in_datastore": stored,
                **environment(first.model.device),
            },
            "cut_texts": results["base"].cut,
            "peak_memory_mb": peak_memory,
        }
        on_disk = {
            name: system.memory for name, system in systems.items() if isinstance(system.memory, DatastoreMemory)
        }
        reports = {name: memory.report for name, memory in on_disk.items()}
        table = markdown_table(results, significance, reports)
        note = "" if comet is None or no_comet is None else f"\n\nNo COMET scores: {no_comet}"
        write_json(out / "results.json", content)
        text = f"{table}\n\n{settings_line(content)}\n\n{systems_lines(content)}{note}\n"
        write_text(out / "results.md", text)
        searched = translation_memory if datastore is None else datastore
        config = translate_config(
            backbone, searched, index, first.mixture, decoding, first.memory.metric, pooled_with or [],
            list(content["settings"]["ensemble_with"].values()),
        )  # fmt: skip
        write_text(out / "translate.yaml", config + "\n")
        lists = {
            f"{name}: {details[name]['index']['factory']}": sizes
            for name, memory in on_disk.items()
            if (sizes := load_index(memory.datastore, systems[name].index, mmap).list_sizes()) is not None
        }
        if lists:
            plot_list_sizes(lists, out / "cluster_sizes.png")
        _show_examples(first, decoding, pairs, results, examples if ranks.size == 1 else 0)
    log.info("\n%s\n\n%s\n\nwritten to %s", table, settings_line(content) + note, out / "results.json")


def _check_systems(
    datastore: Path | None,
    translation_memory: CorpusFile | None,
    others: dict[str, Contender] | None,
    members: dict[str, EnsembleMember],
    online: bool,
    processes: Processes,
) -> None:
    """Refuse systems that cannot be compared, before anything is loaded."""
    if datastore is None and translation_memory is None:
        raise ValueError("datastore is missing, expected the folder of one, or a translation_memory")
    if datastore is None and others:
        raise ValueError(f"others is {', '.join(others)} with datastores, expected none beside a translation_memory")
    if datastore is None and members:
        raise ValueError("ensemble_with is given with datastores, expected none beside a translation_memory")
    if taken := {*members, "ensemble"} & set(others or {}) if members else None:
        raise ValueError(
            f"others has {', '.join(sorted(taken))}, as members of ensemble_with are called; expected others"
        )
    if online and translation_memory is None:
        raise ValueError("online is true, expected a translation_memory, to which a pair can be added at any time")
    if online and processes.devices * processes.num_nodes > 1:
        raise ValueError(f"processes is {processes}, expected one for online: true, which goes sentence by sentence")


def _translators(
    systems: dict[str, System], decoding: Decoding, ranks: Ranks, learned: Sequence[Pair]
) -> dict[str, Translator | OnlineTranslator]:
    """Each system's plain model and its mixture, the first plain model by the name `base`; one that learns pairs."""
    translators: dict[str, Translator | OnlineTranslator] = {}
    for name, system in systems.items():
        plain = "base" if name == "knn" else name.removeprefix("knn_")
        shared = system.memory if isinstance(system.memory, DatastoreMemory) else None
        for label, mixture in ((plain, PlainModel()), (name, system.mixture.open(system.model, system.searched))):
            translators[label] = SharedTranslator(system.model, mixture, decoding, ranks, shared)
        if learned and isinstance(system.memory, PairMemory):
            again = Translator(system.model, system.mixture.open(system.model, system.memory), decoding)
            translators[f"{name}_online"] = OnlineTranslator(again, system.memory, learned)
    return translators


def _ensembles(
    translators: dict[str, Translator | OnlineTranslator], members: dict[str, EnsembleMember]
) -> dict[str, Translator | OnlineTranslator]:
    """The ensemble of the plain models, and that of their mixtures."""
    weights = [1.0, *(member.weight for member in members.values())]
    found: dict[str, Translator | OnlineTranslator] = {}
    for ensemble, names in (
        ("ensemble", ["base", *members]),
        ("knn_ensemble", ["knn", *map("knn_{}".format, members)]),
    ):
        each = [translator for name in names if isinstance(translator := translators[name], Translator)]
        found[ensemble] = EnsembleTranslator(each, weights)
    return found


def _system_details(system: System) -> dict[str, Any]:
    """What a system with neighbors searches, and how it was chosen."""
    settings = system.mixture.settings
    details = {
        "knn": None if settings is None else asdict(settings),
        "mixture": {name: part.configuration for name, part in zip(MIXTURE, system.mixture.parts, strict=True)},
        "index": None,
        "build": None,
        "tuning": None if system.tuning is None else system.tuning.to_json(),
    }
    if isinstance(system.memory, DatastoreMemory):
        build, report = read_build(system.memory.datastore.folder), system.memory.report
        assert report is not None
        details["index"] = asdict(report)
        details["build"] = {"encode": build["encode"], "index": build["indexes"].get(system.index)}
    return details


def _datastore_json(system: System) -> dict[str, Any] | None:
    """The datastore of a system; None if it has a translation memory."""
    if not isinstance(system.memory, DatastoreMemory):
        return None
    store = system.memory.datastore
    where = {"folder": store.folder, "index": system.index, "index_device": system.memory.index.device}
    return where | asdict(store.manifest)


MIXTURE = ("retriever", "combiner", "gate")


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


def _show_examples(
    system: System, decoding: Decoding, pairs: Sequence[Pair], results: dict[str, SystemResult], examples: int
) -> None:
    mixture = system.mixture.open(system.model, system.searched)
    for number in _most_improved(results, [pair.tgt for pair in pairs])[:examples]:
        explanation = explain(mixture, pairs[number].src, decoding)
        log.info("\nsource     %s", pairs[number].src)
        log.info("reference  %s", pairs[number].tgt)
        log.info("base       %s", results["base"].texts[number])
        log.info("kNN        %s", explanation.text)
        log.info("\n".join(explanation_lines(explanation)))


def _most_improved(results: dict[str, SystemResult], references: list[str]) -> list[int]:
    """Sentence numbers, those first whose chrF gained most by kNN."""
    from sacrebleu import sentence_chrf

    def gain(number: int) -> float:
        base, knn = (sentence_chrf(results[name].texts[number], [references[number]]).score for name in ("base", "knn"))
        return knn - base

    return sorted(range(len(references)), key=gain, reverse=True)


def translate_config(
    backbone: BackboneConfig,
    searched: Path | CorpusFile | None,
    index: str,
    mixture: MixtureConfig,
    decoding: Decoding,
    metric: Metric = "l2",
    pooled_with: Sequence[Path] = (),
    ensemble_with: Sequence[dict[str, Any]] = (),
) -> str:
    """A configuration with which `translate.py` uses the same settings; the device is chosen anew."""
    memory: dict[str, Any] = {"datastore": str(searched), "index": index, "metric": metric}
    if isinstance(searched, CorpusFile):
        corpus = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(searched).items()}
        memory = {"translation_memory": corpus}
    if pooled_with:
        memory["pooled_with"] = [str(folder) for folder in pooled_with]
    if ensemble_with:
        memory["ensemble_with"] = list(ensemble_with)
    config = {
        "backbone": _portable(backbone),
        **memory,
        **mixture.configuration,
        "decoding": asdict(decoding),
    }
    return yaml.safe_dump(config, sort_keys=False).strip()


def _member_config(member: EnsembleMember, system: System) -> dict[str, Any]:
    """A member of an ensemble as `translate.py` takes it, with its tuned settings."""
    return {
        "backbone": _portable(member.backbone),
        "datastore": str(member.datastore),
        "index": member.index,
        "metric": system.memory.metric,
        **system.mixture.configuration,
        "weight": member.weight,
    }


def _portable(backbone: BackboneConfig) -> dict[str, Any]:
    return {name: value for name, value in asdict(backbone).items() if name != "device"}


if __name__ == "__main__":
    run_script(evaluate)
