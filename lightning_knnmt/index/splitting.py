"""Centroids whose lists are more even than those of k-means, without training a model: the longest lists are split."""

import heapq
from collections.abc import Callable
from functools import partial

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.index.layers import FAISS_METRICS, at_lists, find_ivf
from lightning_knnmt.metric import Metric

Flat = Callable[[int], faiss.Index]


def split_centroids(
    sample: NDArray[np.float32],
    nlist: int,
    share: float = 0.1,
    iterations: int = 10,
    seed: int = 1,
    flat: Flat = faiss.IndexFlatL2,
    unit: bool = False,
) -> NDArray[np.float32]:
    """k-means with fewer centroids than lists, then the longest list is cut in two until there are enough.

    What k-means spends on a few keys far out is so taken back and spent where many keys are.

    Args:
        sample: Keys, shape (N, D).
        nlist: Number of lists.
        share: Share of the lists that splitting adds, in [0, 1).
        iterations: Of k-means.
        seed: Of k-means.
        flat: Makes the empty exact index of vectors of size D that assigns all keys to centroids, by its metric.
        unit: Whether centroids get unit norm.

    Returns:
        Centroids, shape (nlist, D).

    Raises:
        ValueError: There are fewer keys than lists, or the share is out of range.
    """
    if not 0 <= share < 1:
        raise ValueError(f"share is {share}, expected 0 or more and less than 1")
    if len(sample) < nlist:
        raise ValueError(f"nlist is {nlist}, but there are only {len(sample)} keys; expected at most one list per key")
    first = max(1, nlist - round(share * nlist))
    centroids = list(_k_means(sample, first, iterations, seed, flat, unit))
    nearest = _nearest(np.stack(centroids), sample, flat)
    members = [np.flatnonzero(nearest == number) for number in range(first)]  # [list -> keys]
    longest = [(-len(keys), number) for number, keys in enumerate(members)]
    heapq.heapify(longest)
    while longest and len(centroids) < nlist:
        _, number = heapq.heappop(longest)
        keys = members[number]
        if (halves := _halve(sample[keys], seed, flat(1).metric_type, unit)) is None:
            continue  # all alike: nothing can cut it
        two, in_first = halves
        centroids[number], members[number] = two[0], keys[in_first]
        centroids.append(two[1])
        members.append(keys[~in_first])
        for changed in (number, len(centroids) - 1):
            heapq.heappush(longest, (-len(members[changed]), changed))
    centroids += centroids[:1] * (nlist - len(centroids))  # fewer different keys than lists: the rest stay empty
    return np.stack(centroids)


def metric_centroids(
    sample: NDArray[np.float32], nlist: int, metric: Metric, unit: bool, seed: int = 1
) -> NDArray[np.float32]:
    """Centroids by k-means as an index of a metric is trained.

    Args:
        sample: Keys as the metric sees them (`layers.seen_by`), shape (N, D).
        nlist: Number of lists.
        metric: By what keys are near.
        unit: Whether centroids get unit norm.
        seed: Of k-means.

    Returns:
        Shape (nlist, D).
    """
    flat = partial(_exact, metric=FAISS_METRICS[metric])
    return split_centroids(sample, nlist, 0.0, seed=seed, flat=flat, unit=unit)


def give_centroids(
    index: faiss.Index,
    sample: NDArray[np.float32],
    share: float,
    seed: int,
    flat: Flat = faiss.IndexFlatL2,
    unit: bool = False,
) -> None:
    """Set an untrained index's centroids to those of `split_centroids`; training it then trains its codes only.

    Args:
        index: Not trained.
        sample: Keys, shape (N, D).
        share: Share of the lists that splitting adds.
        seed: Of k-means.
        flat: As in `split_centroids`.
        unit: As in `split_centroids`.

    Raises:
        ValueError: The index has no inverted lists.
    """
    ivf = find_ivf(index)
    if ivf is None:
        raise ValueError(f"split_lists is {share}, but the index has no inverted lists; expected a factory with IVF")
    _train_transforms(index, sample)
    ivf.quantizer.add(split_centroids(at_lists(index, sample), int(ivf.nlist), share, seed=seed, flat=flat, unit=unit))


def _train_transforms(index: faiss.Index, sample: NDArray[np.float32]) -> None:
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexRefine):
        _train_transforms(inner.base_index, sample)
    if isinstance(inner, faiss.IndexPreTransform):
        for number in range(inner.chain.size()):  # type: ignore[attr-defined]
            transform = faiss.downcast_VectorTransform(inner.chain.at(number))  # type: ignore[attr-defined]
            if not transform.is_trained:
                transform.train(sample)
            sample = transform.apply(sample)
        _train_transforms(inner.index, sample)


def _halve(
    keys: NDArray[np.float32], seed: int, metric: int, unit: bool
) -> tuple[NDArray[np.float32], NDArray[np.bool_]] | None:
    """Two centroids and which keys are the first one's; None if the keys are all alike."""
    if len(keys) < 2:
        return None
    flat = partial(_exact, metric=metric)
    two = _k_means(keys, 2, 5, seed, flat, unit)
    in_first = _nearest(two, keys, flat) == 0
    return (two, in_first) if in_first.any() and not in_first.all() else None


def _k_means(
    keys: NDArray[np.float32], number: int, iterations: int, seed: int, flat: Flat, unit: bool
) -> NDArray[np.float32]:
    clustering = faiss.Kmeans(
        keys.shape[1],
        number,
        niter=iterations,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=256,
        spherical=unit,
    )
    clustering.index = flat(keys.shape[1])
    clustering.train(np.ascontiguousarray(keys, np.float32))
    return np.asarray(clustering.centroids)


def _nearest(centroids: NDArray[np.float32], keys: NDArray[np.float32], flat: Flat) -> NDArray[np.int64]:
    """The nearest centroid of each key, shape (N,)."""
    index = flat(centroids.shape[1])
    index.add(np.ascontiguousarray(centroids, np.float32))
    return index.search(np.ascontiguousarray(keys, np.float32), 1)[1][:, 0]


def _exact(size: int, metric: int) -> faiss.Index:
    return faiss.IndexFlat(size, metric)
