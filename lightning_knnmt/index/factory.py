"""FAISS indexes from factory strings, with errors that say what does not fit."""

from collections.abc import Iterator
from contextlib import contextmanager

import faiss

from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.layers import FAISS_METRICS, find_ivf, innermost, returns_hamming
from lightning_knnmt.metric import Metric

RawIndex = faiss.Index  # of any family; others need not import FAISS to name it
REFINED = 4  # candidates for each neighbor that a Refine index scores again; FAISS's 1 would only correct distances


@contextmanager
def refusing(factory: str, what: str, expected: str) -> Iterator[None]:
    """Say which factory string is at fault if FAISS fails.

    Args:
        factory: The factory string.
        what: What FAISS is to do, as in "which FAISS cannot …".
        expected: What would fit.

    Raises:
        ValueError: FAISS failed.
    """
    try:
        yield
    except RuntimeError as error:
        if "gpu" in str(error):
            raise ValueError(
                f"FAISS cannot {what} on a GPU ({error}); expected one with enough free memory: choose device: cpu"
            ) from error
        raise ValueError(f"factory is {factory!r}, which FAISS cannot {what} ({error}); expected {expected}") from error


def make_index(factory: str, key_size: int, metric: Metric = "l2", unit_centroids: bool = True) -> faiss.Index:
    """An index that is neither trained nor filled.

    Args:
        factory: FAISS factory string.
        key_size: D.
        metric: By what keys are near; for `cos`, keys and queries are given with unit norm (`layers.seen_by`).
        unit_centroids: Whether centroids of lists get unit norm, under `ip` and `cos`.

    Raises:
        ValueError: FAISS cannot make it, or its distances would count bits.
    """
    known = "a factory string such as Flat, IVF1024,PQ64x4fs or HNSW32, with a number of sub-quantizers that divides D"
    with refusing(factory, f"make for keys of {key_size} dimensions", known):
        index = faiss.index_factory(key_size, factory, FAISS_METRICS[metric])
    if returns_hamming(index):
        raise ValueError(
            f"factory is {factory!r}, whose distances count bits that differ; expected squared L2 or inner products, "
            "from codes such as SQ8, PQ64x4fs or RaBitQ2"
        )
    if (ivf := find_ivf(index)) is not None:
        ivf.cp.spherical = metric != "l2" and unit_centroids
    if isinstance(index, faiss.IndexRefine):
        index.k_factor = REFINED
    if hasattr(codes := innermost(index), "do_polysemous_training"):
        codes.do_polysemous_training = False  # orders the codes for a search that is not used here, in most of the time
    return index


def check_fits(config: IndexConfig, key_size: int) -> None:
    """Refuse a factory string that FAISS does not know or that does not fit keys of D dimensions.

    Raises:
        ValueError: It does not.
    """
    if config.factory != "auto":
        make_index(config.factory, key_size, config.metric, config.unit_centroids)
