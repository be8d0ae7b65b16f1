"""Exact distances to stored keys."""

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.datastore.mapped_keys import MappedKeys


def rescore(
    queries: NDArray[np.float32], candidates: NDArray[np.int64], keys: MappedKeys, k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The k nearest of each query's candidates by their stored keys.

    A key that several queries have found is read once.

    Args:
        queries: Shape (R, D).
        candidates: Entry numbers, shape (R, K'); −1 where there is none.
        keys: The stored keys.
        k: K, no more than K'.

    Returns:
        Exact squared L2 distances and entry numbers, shapes (R, K), nearest first; +inf and −1 where there is none.
    """
    entries, places = np.unique(candidates, return_inverse=True)
    places = places.reshape(candidates.shape)
    if missing := int(np.searchsorted(entries, 0)):  # 1 if −1 is among them
        entries, places = entries[missing:], places - missing
    stored = torch.from_numpy(keys.rows(entries)).float().numpy()  # several times as fast as numpy's conversion
    queries = np.ascontiguousarray(queries, np.float32)
    places = np.ascontiguousarray(places, np.int64)
    distances = np.empty(candidates.shape, np.float32)
    pointers = [faiss.swig_ptr(array) for array in (distances, queries, stored, places)]
    faiss.fvec_L2sqr_by_idx(*pointers, queries.shape[1], *candidates.shape)  # type: ignore[attr-defined]
    distances[candidates < 0] = np.inf
    order = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(distances, order, 1), np.take_along_axis(candidates, order, 1)
