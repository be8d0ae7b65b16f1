"""What a search costs and what it finds, by index and setting: ``python benchmarks/search.py --quick``.

``--stores base=runs/a/store dispersed=runs/b/store --test data/libreoffice_help/test.jsonl`` asks real datastores for
the teacher-forced states of a test split; ``--synthetic 100000 1000000`` makes datastores of clumps and asks for more
of the same. Exact neighbors by brute force say what each search misses. Indexes stay in the datastores' folders under
names made of their factory strings, where the next run finds them.
"""

import argparse
import hashlib
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import common
import numpy as np
import search_report
import stores
import torch
from memory import STATUS, OwnProcesses, codes_mb, measured_build, measured_search
from numpy.typing import NDArray
from search_settings import (
    Setting,
    index_name,
    recall,
    resolve,
    settings_of,
    total_variation,
    unfiltered,
)

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.comparison import run_systems
from lightning_knnmt.evaluation.report import BUILD_FILE, read_build, system_json
from lightning_knnmt.evaluation.tuning import Grid, likelihoods
from lightning_knnmt.index.config import IndexConfig, Layout
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights
from lightning_knnmt.knn.reference import reference_steps
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.storage.layout import description_file, generation_name, index_file, part_file

TIES = 4  # exact neighbors for each of k, so that any of those as near as the k-th counts as found
QUICK = {
    "synthetic": [4000, 16000], "key_size": 32, "factories": ["IVFauto,PQ16", "IVFauto,PQ16x4fs", "HNSW8"],
    "nprobe": [1, 4, 16], "ef_search": [16, 64], "batch": [1, 16], "queries": 128, "timed": 32, "repeats": 2,
}  # fmt: skip


@dataclass(frozen=True)
class ReferenceStates:
    """Teacher-forced states of references.

    Attributes:
        queries: Shape (R, D).
        tokens: The references' tokens, shape (R,).
        log_probs: The plain model's log-probability of each, shape (R,).
    """

    queries: torch.Tensor
    tokens: torch.Tensor
    log_probs: torch.Tensor


@dataclass(frozen=True)
class Subject:
    """A datastore, and what is asked of it.

    Attributes:
        store: Open.
        backbone: Its model; None: it is synthetic.
        queries: Shape (R, D).
        states: The same as teacher-forced states with the references' tokens; None: it is synthetic.
        exact: Neighbors by brute force, `TIES` for each that is searched.
    """

    store: Datastore
    backbone: KeyedModel | None
    queries: NDArray[np.float32]
    states: ReferenceStates | None
    exact: Neighbors


def build(store: Datastore, factory: str, options: argparse.Namespace, processes: OwnProcesses) -> dict[str, Any]:
    """Build an index or find it built; its figures."""
    config = IndexConfig(factory, name=index_name(factory), layout=options.layout, part_entries=options.part_entries)
    name = generation_name(config.name, store.manifest.generation)
    memory = {}
    if options.memory:
        there, record = description_file(store.folder, name).exists(), read_build(store.folder)
        report, used = processes.run(measured_build, store.folder, config, options.threads)
        if not there:
            record["indexes"][config.name] = {"seconds": report.seconds, "peak_memory_mb": round(used.peak)}
            common.write_json(store.folder / BUILD_FILE, record)
        known = record["indexes"].get(config.name, {})
        if known.get("seconds") == report.seconds:  # else it was built otherwise
            memory["build"] = {"peak": known["peak_memory_mb"]}
    else:
        report = build_index(store, config)
    files = [index_file(store.folder, name)]
    files += [part_file(store.folder, name, number) for number in range(len(report.parts))]
    return {
        "name": config.name,
        "report": asdict(report),
        "bytes_per_entry": sum(file.stat().st_size for file in files) / len(store),
        "memory": memory,
    }


def exact(store: Datastore, queries: NDArray[np.float32], k: int, cache: Path | None) -> Neighbors:
    """Neighbors by brute force, kept beside the results if that took more than seconds."""
    removed = "" if store.manifest.removed is None else store.manifest.removed.sha256
    key = hashlib.sha256(f"{store.fingerprint} {k}{removed}".encode() + queries.tobytes()).hexdigest()[:12]
    path = None if cache is None else cache.with_name(f"{cache.stem}.exact-{key}.npz")
    if path is not None and path.exists():
        with np.load(path, allow_pickle=False) as content:
            distances, ids = content["distances"], content["ids"]
    else:
        start = time.perf_counter()
        distances, ids = stores.exact_neighbors(store, queries, k)
        say(f"{store.folder}: exact neighbors of {len(queries)} queries in {time.perf_counter() - start:.1f} s")
        if path is not None and time.perf_counter() - start > 5:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, distances=distances, ids=ids)
    return Neighbors(torch.from_numpy(distances), torch.from_numpy(store.values[ids]).long(), torch.from_numpy(ids))


def ask(store: Datastore, model: Path | None, options: argparse.Namespace) -> Subject:
    """A real datastore's queries are states of the test split; a synthetic one's, drawn as its keys were."""
    states = backbone = None
    if model is None:
        queries = stores.Clumps(options.key_size, seed=options.seed).queries(options.queries)
    else:
        backbone = load_model(str(model))
        store.check(backbone)
        states = reference_states(backbone, pairs_of(options.test))
        rows = np.random.default_rng(options.seed).permutation(len(states.tokens))[: options.queries]
        chosen = torch.from_numpy(rows)
        states = ReferenceStates(states.queries[chosen], states.tokens[chosen], states.log_probs[chosen])
        queries = states.queries.numpy()
    return Subject(store, backbone, queries, states, exact(store, queries, TIES * options.k, options.json))


def reference_states(backbone: KeyedModel, pairs: Sequence[Pair]) -> ReferenceStates:
    """The states of all references, on the CPU."""
    parts = []
    for reference in reference_steps(backbone, pairs, 2048):
        step = reference.step
        log_probs = (step.logits.gather(1, reference.tokens[:, None]) - step.log_normalizer).squeeze(1)
        parts.append([part.cpu() for part in (step.queries, reference.tokens, log_probs)])
    return ReferenceStates(*(torch.cat(part) for part in zip(*parts, strict=True)))


def choose(subject: Subject, finest: Setting, name: str, options: argparse.Namespace) -> KnnSettings:
    """λ and T of a datastore: as given, by the likelihood of a validation split, or T by a rule and λ 0.5."""
    given = (options.lambda_, options.temperature)
    if subject.backbone is not None and options.validation is not None and None in given:
        grid = Grid(k=[options.k], nprobe=[finest.value])
        if options.lambda_ is not None:
            grid = replace(grid, lambda_=[options.lambda_])
        if options.temperature is not None:
            grid = replace(grid, temperature=[options.temperature])
        memory = DatastoreMemory(subject.store, open_index(subject.store, name))
        pairs = pairs_of(options.validation)
        candidates, *_ = likelihoods(subject.backbone, memory, MixtureConfig.of(), pairs, grid)
        best = max(candidates, key=lambda candidate: candidate.log_likelihood).mixture.settings
        assert best is not None
        return best
    nearest = subject.exact.distances[:, 0]
    telling = nearest[nearest > 1e-5 * float(np.square(subject.queries).sum(1).mean())]  # not stored as they are
    median = float(telling.median()) if len(telling) else 1.0
    return KnnSettings(options.k, options.lambda_ or 0.5, options.temperature or 0.5 * median, finest.value)


def quality(subject: Subject, setting: Setting, knn: KnnSettings) -> dict[str, float | None]:
    """What a setting finds, against exact search."""
    distances, ids = (torch.from_numpy(array) for array in setting.find(subject.queries, knn.k))
    values = torch.from_numpy(subject.store.values)[ids.clamp(min=0)].long().masked_fill(ids < 0, 0)
    found = {
        "recall": recall(ids, subject.exact, knn.k),
        "total_variation": total_variation(
            Neighbors(distances, values, ids), subject.exact.first(knn.k), knn.temperature
        ),
        "codes_scanned": setting.codes_scanned(subject.queries),
    }
    if subject.states is not None:
        match = (values == subject.states.tokens[:, None]) & (ids >= 0)
        log_knn = (knn_log_weights(distances, knn.temperature).exp() * match).sum(1).log()
        plain = subject.states.log_probs
        mixed = torch.logaddexp(log_knn + math.log(knn.lambda_), plain + math.log1p(-knn.lambda_))
        found["log_likelihood"] = float(mixed.double().mean())
    return found


def time_settings(subject: Subject, settings: Sequence[Setting], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Microseconds per query of every setting and batch size, in turn."""
    queries = subject.queries[: max(options.timed, *options.batch)]
    work: dict[str, Callable[[], object]] = {
        f"{setting.name} {batch}": partial(setting.search, queries, options.k, batch)
        for setting in settings
        for batch in options.batch
    }
    times = common.interleaved(work, options.repeats, lambda: None)
    rows = []
    for setting in settings:
        of_batch = {
            batch: [1000 * ms / len(queries) for ms in times[f"{setting.name} {batch}"]] for batch in options.batch
        }
        rows.append(
            {
                "microseconds": {str(batch): statistics.median(values) for batch, values in of_batch.items()},
                "minimum_microseconds": {str(batch): min(values) for batch, values in of_batch.items()},
            }
        )
    return rows


def decode(
    subject: Subject, settings: Sequence[Setting], knn: KnnSettings, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """Scores and speed of the plain model, and of each setting in turn."""
    assert subject.backbone is not None
    longest = Decoding().max_new_tokens
    decoding = Decoding(options.beams, options.sentences, min(longest, subject.backbone.position_limit or longest))
    combiner = FixedCombiner(knn.lambda_, knn.temperature)
    translators = {"base": Translator(subject.backbone, PlainModel(), decoding)}
    for setting in settings:
        memory = DatastoreMemory(subject.store, setting.index)
        mixture = Mixture(subject.backbone, memory, WholeStore(knn.k, **setting.options), combiner)
        translators[setting.name] = Translator(subject.backbone, mixture, decoding)
    return [system_json(result) for result in run_systems(translators, pairs_of(options.test), options.bleu).values()]


def measure(
    store: Datastore, model: Path | None, options: argparse.Namespace, processes: OwnProcesses
) -> dict[str, Any]:
    """Everything about one datastore."""
    subject = ask(store, model, options)
    indexes, settings = {}, []
    for asked in options.factories:
        factory = resolve(asked, len(store), store.key_size)
        say(f"{store.folder}: {factory}")
        built = indexes[asked] = build(store, factory, options, processes)
        index = open_index(store, built["name"])
        settings.append(settings_of(asked, index, options))
        if options.memory:
            built["codes_mb"] = codes_mb(unfiltered(index))
            arguments = (store.folder, built["name"], subject.queries, options.k, max(options.nprobe))
            for way, rescore in (("search", 0), ("mapped", TIES * options.k)):
                used = processes.run(measured_search, *arguments, rescore, way == "mapped", options.threads)
                built["memory"][way] = asdict(used)
    knn = choose(subject, settings[0][-1], indexes[options.factories[0]]["name"], options)
    every = [setting for of_index in settings for setting in of_index]
    say(f"{store.folder}: {len(every)} settings, T {knn.temperature:.3g}")
    rows: list[dict[str, Any]] = [
        {
            "factory": setting.factory,
            "parameter": setting.parameter,
            "value": setting.value if setting.parameter else None,
        }
        | quality(subject, setting, knn)
        | timing
        for setting, timing in zip(every, time_settings(subject, every, options), strict=True)
    ]
    result: dict[str, Any] = {
        "folder": store.folder, "entries": len(store), "key_size": store.key_size, "synthetic": model is None,
        "queries": len(subject.queries), "settings": asdict(knn), "baseline": len(settings[0]) - 1,
        "indexes": indexes, "rows": rows,
    }  # fmt: skip
    if subject.states is not None:
        result["plain_log_likelihood"] = float(subject.states.log_probs.double().mean())
    if options.bleu and subject.backbone is not None:
        result["plain"], *decoded = decode(subject, every, knn, options)
        for row, scores in zip(rows, decoded, strict=True):
            row["decoding"] = scores
    return result


def run(options: argparse.Namespace) -> dict[str, Any]:
    """All datastores in turn."""
    models, measured = dict(options.models), {}
    with OwnProcesses() as processes:
        for label, folder in options.stores:
            with Datastore(folder) as store:
                model = models.get(label, Path(store.manifest.provenance.model))
                measured[label] = measure(store, model, options, processes)
        for entries in options.synthetic:
            clumps = stores.Clumps(options.key_size, seed=options.seed)
            folder = options.folder / f"clumps-{entries}x{options.key_size}-{options.seed}"
            with stores.synthetic_store(folder, clumps, entries) as store:
                measured[f"{entries:,} clumped keys"] = measure(store, None, options, processes)
    result = {"options": vars(options), "stores": measured, **common.environment()}
    headline = {label: search_report.headline(store) for label, store in measured.items()}
    ratio = next(iter(headline.values()), None)
    return {"ratio": ratio, "ratios": headline} | result | {"exponents": search_report.exponents(result)}


def pairs_of(path: Path) -> list[Pair]:
    """The pairs of a split."""
    return list(read_pairs(CorpusFile(path)))


def say(text: str) -> None:
    """Tell what is going on; the tables alone go to stdout."""
    print(text, file=sys.stderr, flush=True)


def labelled(text: str) -> tuple[str, Path]:
    """LABEL=PATH."""
    label, equals, path = text.partition("=")
    if not (label and equals and path):
        raise argparse.ArgumentTypeError(f"{text!r} is not LABEL=PATH, such as base=runs/demo/store")
    return label, Path(path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options, with smaller defaults where `--quick` is among them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small synthetic datastores and few repeats")
    parser.add_argument("--stores", nargs="+", type=labelled, default=[], metavar="LABEL=FOLDER")
    parser.add_argument("--models", nargs="+", type=labelled, default=[], metavar="LABEL=FOLDER",
                        help="models of the datastores, where these do not name the right folder")  # fmt: skip
    parser.add_argument("--test", type=Path, help="split whose states are the queries")
    parser.add_argument("--validation", type=Path, help="split whose likelihood chooses λ and T, at the baseline")
    parser.add_argument(
        "--synthetic", nargs="+", type=int, default=[], metavar="N", help="sizes of datastores of clumps"
    )
    parser.add_argument("--key-size", type=int, default=128, help="D of synthetic keys")
    parser.add_argument("--folder", type=Path, help="where synthetic datastores stay; none: nowhere")
    parser.add_argument("--factories", nargs="+", default=["IVFauto,PQ64", "IVFauto,PQ64x4fs", "auto"],
                        help="factory strings, the baseline first; IVFauto: lists by the square root of N")  # fmt: skip
    parser.add_argument("--nprobe", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--ef-search", nargs="+", type=int, default=[16, 32, 64, 128], help="of graphs (HNSW)")
    parser.add_argument("--k", type=int, default=16)
    parser.add_argument("--lambda", dest="lambda_", type=float)
    parser.add_argument("--temperature", type=float, help="T; none: half the median squared distance of the nearest")
    parser.add_argument("--queries", type=int, default=1024, help="queries that quality is a mean of")
    parser.add_argument("--timed", type=int, default=256, help="of these, searched for in each timed repeat")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 32, 256], help="queries searched for at a time")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--bleu", nargs="?", type=int, const=1, default=0, metavar="REPEATS",
                        help="translate the test split with every setting, after a warm-up")  # fmt: skip
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--sentences", type=int, default=64, help="translated at a time")
    parser.add_argument("--layout", choices=get_args(Layout), default="whole", help="of indexes")
    parser.add_argument("--part-entries", type=int, default=1 << 24, help="of their parts, at least")
    parser.add_argument("--memory", action="store_true",
                        help="build in processes of their own, and search in such too; Linux only")  # fmt: skip
    parser.add_argument(
        "--error", type=float, default=0.1, help="total variation at which growth with N is fitted, too"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for all figures")
    parser.add_argument("--picture", type=Path, help="file for error against time")
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
        options.synthetic = [] if options.stores else options.synthetic
    if not options.stores and not options.synthetic:
        parser.error("nothing to search in: expected --stores, --synthetic or --quick")
    if max(options.batch) > options.queries:
        parser.error(f"--batch is {max(options.batch)}, expected at most --queries, which is {options.queries}")
    if options.lambda_ is not None and not 0 < options.lambda_ < 1:
        parser.error(f"--lambda is {options.lambda_}, expected between 0 and 1, both excluded")
    if options.memory and not STATUS.exists():
        parser.error(f"--memory needs {STATUS}, which only Linux has; leave it out")
    if options.stores and options.test is None:
        parser.error("--stores is given without --test, whose states are the queries")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print tables, and write figures and picture where asked."""
    options = parse(arguments)
    common.set_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        kept, options.folder = options.folder, options.folder or Path(folder)
        result = run(options)
        options.folder = kept
    print(search_report.tables(result))
    if options.json is not None:
        common.write_json(options.json, result)
    if options.picture is not None:
        search_report.draw(result, options.picture)


if __name__ == "__main__":
    main()
