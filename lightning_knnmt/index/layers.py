"""What an index is made of: transforms, refinements and inverted lists, one inside the other.

A proxy that `faiss.downcast_index` gives does not keep its index alive: hold on to the outermost one.
"""

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.metric import Metric

FAISS_METRICS: dict[Metric, int] = {
    "l2": faiss.METRIC_L2, "ip": faiss.METRIC_INNER_PRODUCT, "cos": faiss.METRIC_INNER_PRODUCT
}  # fmt: skip


def seen_by(vectors: NDArray[np.float32], metric: Metric) -> NDArray[np.float32]:
    """Vectors of shape (N, D) as an index of a metric takes them: of unit norm for `cos`."""
    if metric == "cos":
        vectors = np.array(vectors, np.float32, order="C")
        faiss.normalize_L2(vectors)
    return vectors


def innermost(index: faiss.Index) -> faiss.Index:
    """The index under all transforms and refinements, whose codes are searched first."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return innermost(inner.index)
    if isinstance(inner, faiss.IndexRefine):
        return innermost(inner.base_index)
    return inner


def find_ivf(index: faiss.Index) -> "faiss.IndexIVF | None":
    """The inverted-file part of an index, under transforms and refinements; None if there is none."""
    inner = innermost(index)
    return inner if isinstance(inner, faiss.IndexIVF) else None


def find_graph(index: faiss.Index) -> "faiss.IndexHNSW | None":
    """The HNSW graph through which an index finds entries, or the centroids of its lists; None if there is none."""
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        inner = faiss.downcast_index(inner.quantizer)
    return inner if isinstance(inner, faiss.IndexHNSW) else None


def inverted_lists(ivf: faiss.IndexIVF) -> "faiss.InvertedLists":
    """The inverted lists of an index that has them in memory or mapped."""
    if ivf.invlists is None:
        raise ValueError("the index was read without its inverted lists; open it with them")
    return ivf.invlists


def at_lists(index: faiss.Index, queries: NDArray[np.float32]) -> NDArray[np.float32]:
    """Queries as the inverted lists see them, after all transforms such as OPQ and PCA.

    Args:
        index: One with inverted lists.
        queries: Shape (R, D).

    Returns:
        Shape (R, D of the lists).
    """
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        chain = inner.chain
        for number in range(chain.size()):  # type: ignore[attr-defined]
            queries = chain.at(number).apply(queries)  # type: ignore[attr-defined]
        return at_lists(inner.index, queries)
    if isinstance(inner, faiss.IndexRefine):
        return at_lists(inner.base_index, queries)
    return queries


def returns_hamming(index: faiss.Index) -> bool:
    """Whether the distances that an index returns count bits, although FAISS says that its metric is L2."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return returns_hamming(inner.index)
    return isinstance(inner, (faiss.IndexLSH, faiss.IndexIVFSpectralHash))
