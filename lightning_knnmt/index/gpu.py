"""FAISS on GPUs, where it trains, fills and searches indexes; only its GPU build knows what `Gpus` calls."""

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray

from lightning_knnmt.index.config import Device
from lightning_knnmt.index.layers import find_ivf, innermost
from lightning_knnmt.index.merging import merge

log = logging.getLogger(__name__)

MOST_ON_GPU = 2048  # neighbors of a query, and lists that it scans, that FAISS can select on a GPU
OPQ_BITS = 8  # of the codes that FAISS rotates for, whatever those of the index
GPU_FAMILIES = "Flat, IVF1024,Flat, IVF1024,SQ8 or IVF1024,PQ64, alone or after OPQ or PCA, without Refine"
gpu_faiss: Any = faiss  # FAISS's type hints are those of its CPU build


def find_gpus(device: Device) -> "Gpus | None":
    """The GPUs to use; None: the CPU.

    Args:
        device: `auto`: all GPUs that FAISS finds, `cpu`: none, `gpu`: all, at least one.

    Raises:
        ValueError: A GPU is asked for, and FAISS has none.
    """
    number = 0 if device == "cpu" else gpu_faiss.get_num_gpus()
    if device == "gpu" and number == 0:
        why = "finds no CUDA device" if hasattr(faiss, "StandardGpuResources") else "is built for the CPU only"
        raise ValueError(
            f"device is 'gpu', but FAISS {faiss.__version__} {why}; expected a GPU build and a GPU: install "
            "requirements-gpu.txt in an environment without faiss-cpu, or choose auto or cpu"
        )
    return Gpus(tuple(range(number))) if number else None


@dataclass(frozen=True)
class Gpus:
    """GPUs that FAISS computes on.

    Attributes:
        numbers: Their CUDA numbers.
    """

    numbers: tuple[int, ...]

    def share(self, rank: int, size: int) -> "Gpus":
        """Those of one process: all if it is alone, else one, which it shares if there are more processes than GPUs.

        Args:
            rank: Number of the process, from 0.
            size: How many processes there are.
        """
        return self if size == 1 else replace(self, numbers=(self.numbers[rank % len(self.numbers)],))

    def flat(self, size: int, metric: int = faiss.METRIC_L2) -> faiss.Index:
        """An empty exact index of vectors of a size; each GPU holds all of them and answers a share of the queries."""
        return self._copied(_flat(size, metric), shard=False)

    def copy(self, index: faiss.Index) -> faiss.Index:
        """A copy of an index whose entries are divided between the GPUs; lists are found exactly, not through a graph.

        Raises:
            ValueError: FAISS has no GPU version of it.
        """
        message = f"device is a GPU, on which FAISS cannot have this index ({{}}); expected {GPU_FAMILIES}; choose cpu"
        if not has_gpu_version(index):
            raise ValueError(message.format(type(innermost(index)).__name__ + ", or Refine around it"))
        ivf = find_ivf(index)
        try:
            if ivf is None or isinstance(faiss.downcast_index(ivf.quantizer), faiss.IndexFlat):
                return self._copied(index, shard=True)
            with _lent(ivf, "quantizer", _with_centroids(_flat(ivf.d, ivf.metric_type), ivf)):
                return self._copied(index, shard=True)
        except RuntimeError as error:
            raise ValueError(message.format(error)) from error

    def fetch(self, copy: faiss.Index) -> faiss.Index:
        """What `copy` has given, in one piece on the CPU."""
        return gpu_faiss.index_gpu_to_cpu(copy)

    def set_nprobe(self, copy: faiss.Index, nprobe: int) -> None:
        """Choose how many lists a query scans in what `copy` has given."""
        gpu_faiss.GpuParameterSpace().set_index_parameter(copy, "nprobe", nprobe)

    @cached_property
    def _resources(self) -> list[Any]:
        torch.cuda.empty_cache()  # what encoding has reserved and does not use any more
        return [gpu_faiss.StandardGpuResources() for _ in self.numbers]

    def _copied(self, index: faiss.Index, shard: bool) -> faiss.Index:
        options = gpu_faiss.GpuMultipleClonerOptions()
        options.shard = shard
        options.use_cuvs = False  # which has no scalar quantizers
        options.useFloat16 = isinstance(innermost(index), faiss.IndexIVFPQ)  # tables of PQ64 exceed shared memory else
        return gpu_faiss.index_cpu_to_gpu_multiple_py(self._resources, index, options, self.numbers)


def has_gpu_version(index: faiss.Index) -> bool:
    """Whether FAISS knows an index's family on GPUs; it may still refuse a number of bits or sub-quantizers."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        return has_gpu_version(inner.index)
    if type(inner) is faiss.IndexIVFPQ:
        return bool(inner.pq.nbits == 8)
    known = (faiss.IndexFlat, faiss.IndexFlatL2, faiss.IndexFlatIP, faiss.IndexIVFFlat, faiss.IndexIVFScalarQuantizer)
    return type(inner) in known  # a class derived from one of them would lose what it adds


@contextmanager
def assigning(index: faiss.Index, gpus: Gpus | None) -> Iterator[None]:
    """Let GPUs assign points to centroids while an index is trained: of lists, of sub-quantizers and of OPQ's."""
    with ExitStack() as stack:
        for holder, name, lent in [] if gpus is None else _assigners(index, gpus):
            stack.enter_context(_lent(holder, name, lent))
        yield


@contextmanager
def adder(index: faiss.Index, gpus: Gpus | None) -> Iterator[Callable[[NDArray[np.float32]], None]]:
    """Give what adds keys of shape (N, D) to a trained index, as its `add` does, with the help of GPUs.

    To an empty index of a family that FAISS has on GPUs, keys are added in an empty copy there, whose lists are then
    appended to those of the index. For other indexes, GPUs find the keys' lists only, and do nothing if there are none.
    """
    ivf = None if gpus is None else find_ivf(index)
    if gpus is None or ivf is None:
        yield index.add
        return
    if (empty := _copyable(index, gpus)) is not None:

        def add(keys: NDArray[np.float32]) -> None:
            copy = gpus.copy(empty)
            copy.add(keys)
            merge(index, gpus.fetch(copy), int(index.ntotal))

        yield add
        return
    nearest = _with_centroids(_gpu_flat(gpus, ivf), ivf)
    quantizer = faiss.IndexRefine(nearest, ivf.quantizer)  # residuals are taken on the CPU, one by one
    quantizer.k_factor = 2  # two that are equally near on the GPU are told apart as without it
    with _lent(ivf, "quantizer", quantizer):
        yield index.add


def _copyable(index: faiss.Index, gpus: Gpus) -> faiss.Index | None:
    """The index itself without entries, to be copied to GPUs; None if it has some, or FAISS refuses."""
    if index.ntotal or not has_gpu_version(index):
        return None
    empty = faiss.clone_index(index)
    try:
        gpus.copy(empty)
    except ValueError as error:
        log.info("keys are added on the CPU, and GPUs find their lists only: %s", error)
        return None
    return empty


def _assigners(index: faiss.Index, gpus: Gpus) -> Iterator[tuple[Any, str, Any]]:
    """What takes an index that assigns points to centroids, in which field, and that index."""
    inner: Any = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        chain: Any = inner.chain
        for number in range(chain.size()):
            if isinstance(transform := faiss.downcast_VectorTransform(chain.at(number)), faiss.OPQMatrix):
                codes = faiss.ProductQuantizer(transform.d_out, transform.M, OPQ_BITS)
                yield codes, "assign_index", gpus.flat(codes.dsub)
                yield transform, "pq", codes
        yield from _assigners(inner.index, gpus)
        return
    if isinstance(inner, faiss.IndexRefine):
        yield from _assigners(inner.base_index, gpus)
        yield from _assigners(inner.refine_index, gpus)
        return
    if isinstance(inner, faiss.IndexIVF):
        yield inner, "clustering_index", _gpu_flat(gpus, inner)
    if isinstance(getattr(inner, "pq", None), faiss.ProductQuantizer):
        yield inner.pq, "assign_index", gpus.flat(inner.pq.dsub)


def _flat(size: int, metric: int) -> faiss.Index:
    return faiss.IndexFlatL2(size) if metric == faiss.METRIC_L2 else faiss.IndexFlatIP(size)


def _gpu_flat(gpus: Gpus, ivf: faiss.IndexIVF) -> faiss.Index:
    """An exact index that assigns keys to the centroids of lists as their quantizer does."""
    return gpus.flat(ivf.d) if ivf.metric_type == faiss.METRIC_L2 else gpus.flat(ivf.d, ivf.metric_type)


def _with_centroids(flat: faiss.Index, ivf: faiss.IndexIVF) -> faiss.Index:
    flat.add(ivf.quantizer.reconstruct_n(0, int(ivf.nlist)))
    return flat


@contextmanager
def _lent(holder: Any, name: str, lent: Any) -> Iterator[None]:
    """Point a field of a FAISS object at another one for as long as the block runs.

    FAISS's wrapper makes the object the owner of whatever is put into its field; in the end the caller owns it again.
    """
    before = getattr(holder, name)
    setattr(holder, name, lent)
    try:
        yield
    finally:
        setattr(holder, name, before)
        lent.this.own(True)
