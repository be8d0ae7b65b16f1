"""Search indexes over the keys; the only package that imports FAISS."""

from lightning_knnmt.index.builder import build_index
from lightning_knnmt.index.config import IndexConfig, choose_factory
from lightning_knnmt.index.distributed import DistributedIndex
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.opening import open_index, open_parts
from lightning_knnmt.index.report import IndexReport

__all__ = [
    "DistributedIndex",
    "FaissIndex",
    "IndexConfig",
    "IndexReport",
    "build_index",
    "choose_factory",
    "open_index",
    "open_parts",
]
