"""The lists of an inverted file without an index: for measuring keys while they are trained."""

import faiss
import numpy as np
from numpy.typing import NDArray


def assign_to_lists(keys: NDArray[np.float32], nlist: int, seed: int = 1) -> NDArray[np.int64]:
    """Train an inverted file's coarse quantizer on keys, as FAISS does for an IVF index, and assign them to its lists.

    Args:
        keys: Shape (N, D).
        nlist: Number of lists.
        seed: Seed of k-means.

    Returns:
        The list of each key, shape (N,).

    Raises:
        ValueError: There are fewer keys than lists.
    """
    if len(keys) < nlist:
        raise ValueError(f"nlist is {nlist}, but there are only {len(keys)} keys; expected at most one list per key")
    keys = np.ascontiguousarray(keys, np.float32)
    quantizer = faiss.IndexFlatL2(keys.shape[1])
    index = faiss.IndexIVFFlat(quantizer, keys.shape[1], nlist)
    index.cp.seed = seed
    index.cp.min_points_per_centroid = 1  # no warning below 39: it is the imbalance that is wanted, not the index
    index.train(keys)
    return quantizer.search(keys, 1)[1][:, 0]
