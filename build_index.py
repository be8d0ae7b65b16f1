"""Build a datastore and its index, plan, check and change one.

``python build_index.py build --config configs/demo/build.yaml`` builds; ``plan`` with the same options says before what
that will take. ``verify FOLDER`` checks every file of a datastore against its checksum.
``append --config … --datastore.corpus.path new.jsonl``, ``remove FOLDER --document NAME`` and ``compact FOLDER`` change
one; what is searched meanwhile is the datastore as it was. ``prune FOLDER --out NEW`` makes a smaller one of it, and
``sentences FOLDER`` a sentence index.
``torchrun --nproc-per-node 2 build_index.py build --config … --processes.devices 2`` builds in two processes, as does
the same line without ``torchrun``. Options without a command are those of ``build``.
"""

import logging
import re
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.building.config import DatastoreConfig, RekeyConfig, SentencesConfig
from lightning_knnmt.building.pruning.rules import KnowledgeMarginPruning, PruningRule
from lightning_knnmt.cli import log_cut, run_script
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.sentences.report import Likeness
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import write_json
from lightning_knnmt.storage.layout import BUILD_RECORD, MANIFEST
from lightning_knnmt.storage.ranks import Processes, Ranks, refuse_several_processes

if TYPE_CHECKING:  # each command imports what it needs, so that those without a model start at once
    from lightning_knnmt.building.change import Change
    from lightning_knnmt.building.datastore import DatastoreBuild
    from lightning_knnmt.building.plan import Plan
    from lightning_knnmt.index.report import IndexReport

log = logging.getLogger("lightning_knnmt.build_index")


def build(
    backbone: BackboneConfig,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    processes: Processes = Processes(),
) -> None:
    """Encode a parallel corpus and index its keys; what is already there and fits is kept.

    Beside the shards and the index, build.json says how long each stage took and how much memory it needed.

    Args:
        backbone: The model whose states become the keys, such as --backbone.model
            data/models/firefox-en-pt, and how it is loaded.
        datastore: The corpus and where the datastore goes.
        index: The index over it.
        processes: How many processes build together.
    """
    from lightning_knnmt.building.datastore import build_datastore
    from lightning_knnmt.index.factory import check_fits

    _check_before(datastore)
    model = backbone.load()
    check_fits(index, model.key_size)
    with processes.start(model) as ranks:
        if ranks.rank > 0:
            logging.getLogger("lightning_knnmt").setLevel(logging.WARNING)
        start = time.perf_counter()
        built = build_datastore(model, datastore, ranks)
        encode = _encode_record(built, time.perf_counter() - start)
        _index(datastore.folder, index, encode, ranks)
        if ranks.rank == 0:
            log_cut(built.cut)


def _index(folder: Path, index: IndexConfig, encode: dict[str, Any] | None, ranks: Ranks = Ranks()) -> None:
    """Index the keys of a datastore, and say on the first process how that went."""
    from lightning_knnmt.building.index import build_index
    from lightning_knnmt.datastore import Datastore
    from lightning_knnmt.index.opening import load_index
    from lightning_knnmt.timing import peak_memory_mb

    with Datastore(folder) as store:
        report = build_index(store, index, ranks)
        if ranks.rank > 0:
            return
        sizes = load_index(store, index.name).list_sizes()
    spread = None if sizes is None else _spread(sizes.tolist())
    _record(folder, index.name, encode, report, spread)
    _log_report(report, spread)
    log.info("peak memory %s MB", peak_memory_mb())


def states(
    backbone: BackboneConfig,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    processes: Processes = Processes(),
) -> None:
    """Store the states that enter the last feed-forward layer, for training what follows them: train.py, then `rekey`.

    They are a datastore of the key type `ffn_residual`, in float32, resumed and verified as any other.

    Args:
        backbone: The model, whatever its key type.
        datastore: The corpus, and where the states go.
        index: As in the configuration of `build`; states have none.
        processes: How many processes build together.
    """
    from lightning_knnmt.building.datastore import build_datastore

    _check_before(datastore)
    model = replace(backbone, key_type="ffn_residual").load()
    with processes.start(model) as ranks:
        if ranks.rank > 0:
            logging.getLogger("lightning_knnmt").setLevel(logging.WARNING)
        start = time.perf_counter()
        built = build_datastore(model, datastore, ranks)
        if ranks.rank == 0:
            if (encode := _encode_record(built, time.perf_counter() - start)) is not None:
                write_json(datastore.folder / BUILD_RECORD, {"encode": encode, "indexes": {}})
            log_cut(built.cut)


def rekey(backbone: BackboneConfig, datastore: RekeyConfig, index: IndexConfig = IndexConfig()) -> None:
    """Make the datastore of a fine-tuned model from stored states, without running the model, and index its keys.

    Args:
        backbone: The fine-tuned model.
        datastore: The states, which `states` stored, and where the keys go.
        index: The index over them.
    """
    refuse_several_processes("rekey")
    from lightning_knnmt.building.rekey import rekey as make_keys
    from lightning_knnmt.index.factory import check_fits

    model = backbone.load()
    check_fits(index, model.key_size)
    start = time.perf_counter()
    built = make_keys(model, datastore)
    _index(datastore.folder, index, _encode_record(built, time.perf_counter() - start))


def _check_before(datastore: DatastoreConfig) -> None:
    """See to it that the corpus is there and that its datastore can go where it is to, before a model is loaded."""
    from lightning_knnmt.checks import check_folder
    from lightning_knnmt.data.readers import ReadReport, read_pairs

    if not (datastore.folder / MANIFEST).exists():  # which may be in a folder for reading only
        check_folder(folder=datastore.folder)
    if next(read_pairs(datastore.corpus, ReadReport()), None) is None:
        raise ValueError(f"path is {datastore.corpus.path}, which has no pairs, expected one or more")


def _encode_record(built: "DatastoreBuild", seconds: float) -> dict[str, Any] | None:
    """The entry of build.json on encoding; None if it was done before."""
    from lightning_knnmt.timing import peak_memory_mb

    if built.kept:
        return None
    entries, pairs = built.manifest.entries, built.manifest.pairs
    log.info("encode %.1f s, %.0f entries/s", seconds, built.encoded / seconds)
    return {"seconds": round(seconds, 3), "peak_memory_mb": peak_memory_mb(), "entries": entries, "pairs": pairs}


def _record(
    folder: Path, name: str, encode: dict[str, Any] | None, report: "IndexReport", spread: dict[str, int] | None
) -> None:
    """Put into build.json what is new; an index that was there before has the times that are written there."""
    from lightning_knnmt.evaluation.report import read_build
    from lightning_knnmt.timing import peak_memory_mb

    record = read_build(folder)
    if encode is not None:
        record = {"encode": encode, "indexes": {}}
    if record["indexes"].get(name, {}).get("seconds") != report.seconds:
        built: dict[str, Any] = {"seconds": report.seconds, "peak_memory_mb": peak_memory_mb()}
        record["indexes"][name] = built | ({} if spread is None else {"list_sizes": spread})
        log.info("index %s", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items()))
    if record != read_build(folder):
        write_json(folder / BUILD_RECORD, record)


def _spread(sizes: list[int]) -> dict[str, int]:
    import numpy as np

    shortest, median, longest = (int(size) for size in np.quantile(sizes, (0, 0.5, 1)))
    return {"smallest": shortest, "median": median, "largest": longest, "empty": sizes.count(0)}


def _log_report(report: "IndexReport", spread: dict[str, int] | None) -> None:
    if spread is None or report.imbalance_factor is None or report.homogeneity is None:
        log.info("%s: %d entries, no lists", report.factory, report.entries)
        return
    log.info("%s: %d entries in %d lists", report.factory, report.entries, report.nlist)
    log.info("list sizes: %s", ", ".join(f"{name} {size}" for name, size in spread.items()))
    log.info("imbalance factor %.2f, homogeneity %.3f", report.imbalance_factor, report.homogeneity)


def plan(
    backbone: BackboneConfig,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    processes: Processes = Processes(),
    entries: int | None = None,
    machines: int | None = None,
    sample_pairs: int = 2000,
) -> "Plan":
    """Print what a build would take, without building: entries, disk, peak memory, and the time of each stage.

    Rates are measured on this machine within about a minute: a sample of the corpus is encoded, and small indexes over
    its keys are trained and filled, in a temporary folder on the datastore's disk.

    Args:
        backbone: The model.
        datastore: The corpus, which is also the sample for other numbers of entries, and where the datastore goes.
        index: The index over it.
        processes: As for building; each counts as a machine.
        entries: Plan for so many entries of texts like those of the corpus, not for the corpus.
        machines: Machines such as this one that share the work, one process each; as many as `processes` by default.
        sample_pairs: Pairs to encode.

    Returns:
        The plan that was printed.

    Raises:
        ValueError: There are no pairs, a number is less than 1, or FAISS does not know the factory string.
    """
    from lightning_knnmt.building.plan import make_plan, to_text

    share = processes.devices * processes.num_nodes if machines is None else machines
    made = make_plan(backbone.load(), datastore, index, entries, share, sample_pairs)
    sys.stdout.write(to_text(made) + "\n")
    return made


def verify_datastore(folder: Path) -> None:
    """Check every file of a datastore and of its indexes against the checksums taken when they were written.

    Args:
        folder: The datastore.

    Raises:
        DatastoreError: Something is missing or was changed since.
    """
    from lightning_knnmt.building.verify import verify

    if problems := verify(folder):
        raise DatastoreError(f"{folder} is damaged: {'; '.join(map(str, problems))}; build it again")
    log.info("%s is whole", folder)


def append(
    backbone: BackboneConfig,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    processes: Processes = Processes(),
) -> None:
    """Append the pairs of a corpus to a datastore and to all of its indexes; those that are stored are skipped.

    Args:
        backbone: The model that the datastore was built with.
        datastore: The corpus to append, and the datastore's folder.
        index: As in the configuration of `build`; indexes keep the settings that they were built with.
        processes: As in the configuration of `build`; one process appends.
    """
    refuse_several_processes("append")
    from lightning_knnmt.building.append import append_pairs

    _check_before(datastore)
    change = append_pairs(backbone.load(), datastore)
    log.info("%d pairs appended, %d were stored before", change.pairs, change.known)
    _log_change(change)
    log_cut(change.cut)


def remove(folder: Path, document: list[str] | None = None) -> None:
    """Remove documents from a datastore: from the next time it is opened, no search finds them.

    Args:
        folder: The datastore.
        document: Name of a document, as it is stored with its pairs; may be given several times.

    Raises:
        ValueError: No document is named.
    """
    refuse_several_processes("remove")
    from lightning_knnmt.building.remove import remove_documents

    if not document:
        raise ValueError("document is missing, expected the name of one or more: --document NAME")
    done = remove_documents(folder, document)
    log.info("%d pairs with %d entries removed", done.pairs, done.entries)
    log.info("%d of %d entries are removed and take room until `compact`", done.removed, done.total)


def compact_datastore(folder: Path) -> None:
    """Write a datastore anew without what was removed, put small shards together, and train its indexes again.

    Args:
        folder: The datastore.
    """
    refuse_several_processes("compact")
    from lightning_knnmt.building.compact import compact

    change = compact(folder)
    log.info("%d removed pairs cleared away", change.pairs)
    _log_change(change)


def prune_datastore(
    folder: Path,
    out: Path | None = None,
    rule: PruningRule = KnowledgeMarginPruning(),
    backbone: BackboneConfig | None = None,
    index: IndexConfig = IndexConfig(),
    searched: str = "index",
    nprobe: int = 8,
) -> None:
    """Write a smaller datastore, without the entries that a rule drops, and index it; the first one stays as it is.

    The new manifest.json says under `pruned` how many entries were dropped, and why. A run that is stopped goes on
    where it was.

    Args:
        folder: The datastore.
        out: Folder of the smaller one.
        rule: Which entries are dropped, by class_path and init_args.
        backbone: The datastore's model, for rules that ask which entries it predicts by itself.
        index: The index of the smaller datastore.
        searched: Name of the datastore's index in which the rule looks for neighbors.
        nprobe: Inverted lists that each of these searches scans.

    Raises:
        ValueError: No folder is named, or the rule needs a model and there is none.
    """
    refuse_several_processes("prune")
    from lightning_knnmt.building.pruning.pruning import prune

    if out is None:
        raise ValueError("out is missing, expected the folder of the smaller datastore: --out NEW")
    if rule.asks_model and backbone is None:
        raise ValueError(f"backbone is missing, expected the datastore's model, which {type(rule).__name__} asks")
    model = None if backbone is None else backbone.load()
    made = prune(folder, out, rule, model, index, searched, nprobe)
    info = made.manifest.pruned[-1]
    for reason, count in info.dropped.items():
        log.info("%d of %d entries dropped: %s", count, info.entries, reason)
    log.info(
        "%d entries of %d pairs are left; %d pairs have none", made.manifest.entries, made.manifest.pairs, info.pairs
    )
    _record(out, index.name, None, made.index, None)


def _log_change(change: "Change") -> None:
    manifest = change.manifest
    log.info("%d entries of %d pairs in %d shards", manifest.entries, manifest.pairs, len(manifest.shards))
    for name, report in change.indexes.items():
        even = "" if report.imbalance_factor is None else f", imbalance factor {report.imbalance_factor:.2f}"
        then = report.trained_imbalance_factor
        after = "" if then is None else f" ({then:.2f} when trained)"
        log.info("index %s: %s, %d entries added since training%s%s", name, report.factory, report.added, even, after)


def make_sentences(
    folder: Path,
    by: Likeness = "bm25",
    name: str = "sentences",
    encoder: str | None = None,
    backbone: BackboneConfig | None = None,
    overwrite: bool = False,
) -> None:
    """Make a sentence index of a datastore: which stored sentences are like a text, for the retriever `Subset`.

    It is kept up by `append`, `remove` and `compact`.

    Args:
        folder: The datastore.
        by: `bm25` or `tf_idf`: compared by their words; `states`: by averaged encoder states of the translation model;
            `encoder`: by another encoder.
        name: Files are called NAME.sentences.safetensors and .json, beside the shards.
        encoder: Hub name or folder of that other encoder, such as one of sentence-transformers.
        backbone: The model that the datastore was built with, for `--by states`.
        overwrite: Replace a sentence index of that name that was made otherwise.
    """
    refuse_several_processes("sentences")
    config = SentencesConfig(by, name, encoder, overwrite)
    from lightning_knnmt.building.sentences import build_sentences
    from lightning_knnmt.datastore import Datastore

    with Datastore(folder) as store:
        model = None if backbone is None else backbone.load()
        report = build_sentences(store, config, model)
    log.info("sentence index %s: %d sentences by %s", name, report.sentences, report.by)


COMMANDS: dict[str, Callable[..., object]] = {
    "build": build,
    "states": states,
    "rekey": rekey,
    "plan": plan,
    "verify": verify_datastore,
    "append": append,
    "remove": remove,
    "compact": compact_datastore,
    "prune": prune_datastore,
    "sentences": make_sentences,
}


def main(args: list[str]) -> None:
    """Run the command that the arguments begin with."""
    run_script(COMMANDS, spell_out(args))


def spell_out(args: list[str]) -> list[str]:
    """Arguments as jsonargparse takes them: a command first, then a folder by its place, and each document added.

    So what was written for earlier versions goes on working: options alone, which are those of `build`, and
    `--folder FOLDER` for commands on one datastore.
    """
    if args and args[0].startswith("-") and args[0] not in ("-h", "--help"):
        args = ["build", *args]
    if args and args[0] in ("verify", "remove", "compact", "prune", "sentences"):
        args = [arg.removeprefix("--folder=") for arg in args if arg != "--folder"]
        args = [re.sub(r"^--document(?==|$)", "--document+", arg) for arg in args]
    return args


if __name__ == "__main__":
    main(sys.argv[1:])
