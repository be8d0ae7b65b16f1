"""How even lists are, by how they are trained: ``python benchmarks/balance.py base=runs/libreoffice_help/store``.

For each datastore: k-means on a uniform sample, on the first and last entries (sentences are in the order of their
lengths, so these are the longest and the shortest), and on another datastore's keys; and what can be had without
training a model: keys of unit norm, whitened keys, long lists split. Imbalance factor, codes that a query scans, and
(`--timed`) microseconds of a query in lists of PQ64 codes. Inner products and cosines stand last.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import common
import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.datastore import Datastore
from lightning_knnmt.dispersion.functional.directions import directions
from lightning_knnmt.evaluation.report import table
from lightning_knnmt.index.balance import homogeneity, imbalance_factor
from lightning_knnmt.index.factory import make_index
from lightning_knnmt.index.splitting import metric_centroids, split_centroids
from lightning_knnmt.metric import Metric

Keys = NDArray[np.float32]


def unit_norm(keys: Keys) -> Keys:
    """Every key divided by its norm."""
    return keys / np.linalg.norm(keys, axis=1, keepdims=True)


def whitened(keys: Keys) -> Keys:
    """Keys whose covariance is the identity (PCA-W without reduction)."""
    part = keys[:: max(1, len(keys) // 100_000)].astype(np.float64)
    variances, axes = np.linalg.eigh(np.cov(part.T))
    return ((keys - part.mean(0)) @ (axes / np.sqrt(variances + 1e-6 * variances.max()))).astype(np.float32)


Way = tuple[str, Callable[[], tuple[Keys, Keys]]]  # its name; makes keys as the index holds them, and centroids


def indexes(keys: Keys, foreign: Keys | None, nlist: int, per_list: int, seed: int) -> Iterator[Way]:
    """Ways of training a coarse quantizer by squared distances; nothing is computed before it is called."""

    def trained(sample: Keys, share: float = 0.0) -> tuple[Keys, Keys]:
        return keys, split_centroids(sample, nlist, share)

    def fair(share: float = 0.0) -> tuple[Keys, Keys]:
        return trained(keys[rows], share)

    def changed(change: Callable[[Keys], Keys]) -> tuple[Keys, Keys]:
        held = change(keys)
        return held, split_centroids(held[rows], nlist, 0.0)

    rows = np.random.default_rng(seed).permutation(len(keys))[: per_list * nlist]
    yield "uniform sample", fair
    if len(rows) < len(keys):
        yield "longest sentences", partial(trained, keys[: len(rows)])
        yield "shortest sentences", partial(trained, keys[-len(rows) :])
    if foreign is not None and len(foreign) >= nlist:
        yield "another datastore", partial(trained, foreign)
    for share in (0.1, 0.3):
        yield f"long lists split, {share:.0%}", partial(fair, share)
        if len(rows) < len(keys):
            yield f"shortest sentences, split {share:.0%}", partial(trained, keys[-len(rows) :], share)
    yield "unit norm", partial(changed, unit_norm)
    yield "whitened", partial(changed, whitened)


def by_products(keys: Keys, nlist: int, per_list: int, seed: int) -> Iterator[Way]:
    """The same by inner products and cosines, from a uniform sample, with centroids of unit norm and of any."""

    def trained(metric: Metric, unit: bool) -> tuple[Keys, Keys]:
        held = unit_norm(keys) if metric == "cos" else keys
        return held, metric_centroids(held[rows], nlist, metric, unit)

    rows = np.random.default_rng(seed).permutation(len(keys))[: per_list * nlist]
    yield "inner product, any centroids", partial(trained, "ip", False)
    yield "inner product, unit centroids", partial(trained, "ip", True)
    yield "cosine", partial(trained, "cos", True)


def measure(
    keys: Keys, tokens: NDArray[np.int32], centroids: Keys, nprobe: int, metric: int = faiss.METRIC_L2
) -> dict[str, float]:
    """Imbalance factor, homogeneity, and the codes scanned by queries that follow the keys, as a share of N."""
    index = faiss.IndexFlat(keys.shape[1], metric)
    index.add(centroids)
    lists = np.concatenate([index.search(part, 1)[1][:, 0] for part in np.array_split(keys, 1 + len(keys) // 65536)])
    sizes = np.bincount(lists, minlength=len(centroids))
    probed = index.search(np.ascontiguousarray(keys[:: max(1, len(keys) // 2000)]), nprobe)[1]
    return {
        "imbalance_factor": imbalance_factor(torch.from_numpy(sizes)),
        "homogeneity": homogeneity(torch.from_numpy(lists), torch.from_numpy(tokens.astype(np.int64))),
        "largest_list": float(sizes.max() / sizes.mean()),
        "scanned": float(sizes[probed].sum(1).mean() / len(keys)),
    }


def microseconds(keys: Keys, centroids: Keys, nprobe: int, repeats: int = 5) -> float:
    """Median time of a query that follows the keys, in batches of 32, in an IVF with PQ64, the field's default."""
    key_size = keys.shape[1]
    index: Any = make_index(f"IVF{len(centroids)},PQ{min(64, key_size)}", key_size)
    index.quantizer.add(centroids)
    index.train(keys[:: max(1, len(keys) // 65536)])  # of the codes alone: there are centroids
    for part in np.array_split(keys, 1 + len(keys) // 65536):
        index.add(part)
    index.nprobe = nprobe
    queries = np.ascontiguousarray(keys[:: max(1, len(keys) // 1024)])
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for first in range(0, len(queries), 32):
            index.search(queries[first : first + 32], 16)
        times.append((time.perf_counter() - start) / len(queries))
    return 1e6 * statistics.median(times)


def main(arguments: list[str] | None = None) -> None:
    """Measure every store with every number of lists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stores", nargs="+", metavar="LABEL=FOLDER")
    parser.add_argument("--foreign", type=Path, help="datastore of the same model with another domain")
    parser.add_argument("--nlist", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--nprobe", type=int, default=8)
    parser.add_argument("--timed", type=int, metavar="NPROBE", help="time searches with PQ64 codes at this nprobe, too")
    parser.add_argument("--only", nargs="+", help="ways of training; all by default", metavar="WAY")
    parser.add_argument("--per-list", type=int, default=64, help="training keys for each list")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    common.set_threads(options.threads)
    foreign = None
    if options.foreign is not None:
        with Datastore(options.foreign) as store:
            foreign = store.sample_keys(len(store))
    results: list[dict[str, Any]] = []
    rows = [["store", "MRL", "lists", "trained on", "imbalance", "homogeneity", "largest list", "codes scanned"]]
    rows[0] += [] if options.timed is None else ["µs per query"]
    for label, folder in (name.split("=", 1) for name in options.stores):
        with Datastore(Path(folder)) as store:
            keys, tokens = store.sample_keys(len(store)), store.values
        length = float(directions(torch.from_numpy(keys)).mean(0).norm())
        for nlist in options.nlist:
            by_distance = indexes(keys, foreign, nlist, options.per_list, options.seed)
            ways = chain(
                ((way, faiss.METRIC_L2) for way in by_distance),
                ((way, faiss.METRIC_INNER_PRODUCT) for way in by_products(keys, nlist, options.per_list, options.seed)),
            )
            for (name, make), metric in ways:
                if options.only is not None and name not in options.only:
                    continue
                held, centroids = make()
                found = measure(held, tokens, centroids, options.nprobe, metric)
                if options.timed is not None:
                    found["microseconds"] = microseconds(held, centroids, options.timed)
                results.append({"store": label, "mean_resultant_length": length, "nlist": nlist, "way": name, **found})
                rows.append(
                    [
                        label, f"{length:.2f}", f"{nlist:,}", name, f"{found['imbalance_factor']:.2f}",
                        f"{found['homogeneity']:.3f}", f"{found['largest_list']:.1f} × mean", f"{found['scanned']:.2%}",
                    ]
                )  # fmt: skip
                if options.timed is not None:
                    rows[-1].append(f"{found['microseconds']:.0f}")
    print(table(rows))
    if options.json is not None:
        common.write_json(options.json, {"nprobe": options.nprobe, "results": results} | common.environment())


if __name__ == "__main__":
    main()
