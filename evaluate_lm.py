"""Compare a language model with kNN-LM: ``python evaluate_lm.py --config configs/lm/smollm2.yaml``."""

import logging
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from evaluate import translate_config
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Provenance
from lightning_knnmt.decoding import Decoding
from lightning_knnmt.evaluation.perplexity import (
    check_documents_apart,
    perplexities,
    perplexity_table,
    tune_likelihood,
)
from lightning_knnmt.evaluation.report import environment, read_build
from lightning_knnmt.evaluation.tuning import Tune
from lightning_knnmt.index.config import SearchDevice
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import Gate
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.retrievers.automaton import Automaton
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.memory import open_memory
from lightning_knnmt.storage.files import file_sha256, write_json, write_text
from lightning_knnmt.timing import peak_memory_mb

log = logging.getLogger("lightning_knnmt.evaluate_lm")


def evaluate_lm(
    backbone: BackboneConfig,
    datastore: Path,
    test: CorpusFile,
    out: Path,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    retriever: Retriever | None = None,
    combiner: Combiner | None = None,
    gate: Gate | None = None,
    tuning: Tune | None = None,
    min_pointers: list[int] | None = None,
    decoding: Decoding = Decoding(beams=1),
    max_tokens: int = 1024,
    index_device: SearchDevice = "cpu",
    mmap: bool = False,
    checksums: bool | None = None,
) -> None:
    """Predict held-out documents with a language model, alone and with the neighbors of a datastore.

    Args:
        backbone: The language model.
        datastore: Folder of a datastore built from it.
        test: Windows of documents that are not in the datastore, such as test.jsonl of prepare_data.py.
        out: Folder for results.json, results.md and the translate.yaml with which translate.py continues texts.
        index: Name of the datastore's index.
        knn: The usual search and mixture, where no class is chosen below.
        retriever: Where neighbors come from, by class_path and init_args.
        combiner: How they are mixed in, by class_path and init_args.
        gate: Which rows search, by class_path and init_args.
        tuning: Windows of other documents on which the options are chosen by likelihood; none: they stay as given.
        min_pointers: Compare with RetoMaton (arXiv 2201.12431), which follows pointers of the last neighbors where so
            many are left, and searches elsewhere: each number is a system pointers_NUMBER with the options of knn.
        decoding: How translate.yaml continues texts.
        max_tokens: Most tokens of a teacher-forced batch.
        index_device: Where the index is searched: `cpu`; `gpu`: divided between all GPUs; `auto`: there if FAISS can;
            `torch_keys`: among all stored keys, by torch on the model's device; `torch_codes`: among all its codes.
        mmap: Leave the index's entries on the disk, for an index that is larger than memory.
        checksums: Compare the datastore's bytes with their checksums first; null: those of files up to 256 MB in all.
    """
    chosen = MixtureConfig.of(knn, retriever, combiner, gate)
    check_automata(chosen, min_pointers or [])
    splits = {"test": test} if tuning is None else {"test": test, "validation": tuning.validation}
    pairs = {name: list(read_pairs(corpus)) for name, corpus in splits.items()}
    with open_memory(datastore, index, mmap, index_device, checksums=checksums) as memory:
        metric = memory.metric
        stored = (pair for shard in memory.datastore.shards for pair in shard.pairs())
        check_documents_apart({"the datastore": stored, **pairs})
        model = backbone.load()
        memory.check(model)
        tuned = None
        if tuning is not None:
            tuned = tune_likelihood(model, memory, chosen, pairs["validation"], tuning.grid)
            chosen = tuned.best.mixture
        systems: dict[str, Mixture | PlainModel] = {"base": PlainModel(), "knn": chosen.open(model, memory)}
        systems |= {
            f"pointers_{n}": each.open(model, memory) for n, each in automata(chosen, min_pointers or []).items()
        }
        results = perplexities(model, systems, pairs["test"], max_tokens)
        report, build = memory.report, read_build(datastore)
        imbalance_factor = None if report is None else report.imbalance_factor
        content: dict[str, Any] = {
            "systems": {name: result.to_json() for name, result in results.items()},
            "index": None if report is None else asdict(report),
            "build": {"encode": build["encode"], "index": build["indexes"].get(index)},
            "tuning": None if tuned is None else tuned.to_json(),
            "settings": {
                "mixture": chosen.configuration,
                "grid": None if tuning is None else asdict(tuning.grid),
                "max_tokens": max_tokens,
                **{
                    name: asdict(corpus) | {"windows": len(pairs[name]), "sha256": file_sha256(corpus.path)}
                    for name, corpus in splits.items()
                },
                "model": asdict(Provenance.of(model)) | {"dtype": model.dtype},
                "datastore": {"folder": datastore, "index": index, "entries": len(memory)},
                **environment(model.device),
            },
            "peak_memory_mb": peak_memory_mb(),
        }
    table = perplexity_table(results, imbalance_factor)
    how = "given" if tuned is None else f"best of {tuned.tried} on {tuned.tokens} tokens of other documents"
    line = (
        f"{results['base'].tokens} tokens of {test.path}; {chosen} ({how}); "
        f"{content['settings']['datastore']['entries']} entries"
        f"{'' if report is None else f' in {report.factory}'}; "
        f"threads: {content['settings']['threads']['torch']}; "
        f"model {model.name} {model.model_fingerprint[:12]}"
    )
    write_json(out / "results.json", content)
    write_text(out / "results.md", f"{table}\n\n{line}\n")
    config = translate_config(backbone, datastore, index, chosen, decoding, metric)
    write_text(out / "translate.yaml", config + "\n")
    log.info("\n%s\n\n%s\n\nwritten to %s", table, line, out / "results.json")


def automata(mixture: MixtureConfig, min_pointers: Sequence[int]) -> dict[int, MixtureConfig]:
    """The same mixture with pointers followed, by the number of pointers that are enough."""
    options = mixture.retriever.options
    return {least: replace(mixture, retriever=Automaton(**options | {"min_pointers": least})) for least in min_pointers}


def check_automata(mixture: MixtureConfig, min_pointers: Sequence[int]) -> None:
    """Refuse pointers of other neighbors than those of the whole store, before anything is loaded.

    Raises:
        ValueError: Another retriever is chosen, or a number is too small.
    """
    if min_pointers and not isinstance(mixture.retriever, WholeStore):
        raise ValueError(
            f"min_pointers is {list(min_pointers)} with the retriever {type(mixture.retriever).__name__}, expected "
            "WholeStore, whose neighbors point to the next ones"
        )
    automata(mixture, min_pointers)


if __name__ == "__main__":
    run_script(evaluate_lm)
