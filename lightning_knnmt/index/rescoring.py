"""Exact distances to stored keys."""

from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.datastore.mapped_keys import MappedKeys
from lightning_knnmt.index.layers import seen_by
from lightning_knnmt.metric import Metric

CANDIDATES_AT_ONCE = 2048  # whose keys fit into a processor's cache


def rescore(
    queries: NDArray[np.float32], candidates: NDArray[np.int64], keys: MappedKeys, k: int, metric: Metric = "l2"
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest of each query's candidates by their stored keys.

    Args:
        queries: Shape (R, D).
        candidates: Entry numbers, shape (R, K'); −1 where there is none.
        keys: The stored keys.
        k: K, no more than K'.
        metric: By what entries are near.

    Returns:
        Exact distances (see `knn.Neighbors`) and entry numbers, shapes (R, K), nearest first; +inf and −1 where there
        is none.
    """
    count, each = candidates.shape
    missing = candidates < 0
    distances = np.full(candidates.shape, np.inf, np.float32)
    if not missing.all() and count:
        entries = np.where(missing, candidates.max(), candidates)  # any that there is
        queries = seen_by(np.ascontiguousarray(queries, np.float32), metric)
        compare: Any = faiss.fvec_L2sqr_by_idx if metric == "l2" else faiss.fvec_inner_products_by_idx  # type: ignore[attr-defined]
        step = max(1, CANDIDATES_AT_ONCE // each)
        places = np.arange(min(step, count) * each)
        for first in range(0, count, step):
            block = entries[first : first + step]
            stored = torch.from_numpy(keys.rows(block.reshape(-1))).float().numpy()  # faster than numpy's conversion
            stored = seen_by(stored, metric)
            pointers = [faiss.swig_ptr(array) for array in (distances[first:], queries[first:], stored, places)]
            compare(*pointers, queries.shape[1], *block.shape)
        if metric != "l2":
            np.negative(distances, out=distances)
        distances[missing] = np.inf
    order = distances.argsort(1, kind="stable")[:, :k]
    rows = np.arange(count)[:, None]
    return distances[rows, order], candidates[rows, order]
