"""Codes of product quantization taken out of a FAISS index, in the order of the entries."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.index.layers import innermost, inverted_lists


@dataclass(frozen=True)
class StoredCodes:
    """Codes of N entries, W bytes each, and what they stand for.

    A key is A x + b, less the centroid of its list where there is one, cut into M pieces of S dimensions, each of which
    is the nearest of L codewords. With 8 bits a byte is a code; with 4 bits it is two, the first in its low half.

    Attributes:
        codes: Shape (N, W).
        codebooks: Shape (M, L, S), L 256 or 16; with 4 bits and an odd M a piece of zeros is added.
        norms: Squared norm of each decoded key, centroid included, shape (N,).
        lists: The inverted list of each entry, shape (N,); None if codes do not depend on it.
        centroids: Shape (nlist, M · S); None as before.
        matrix: A, shape (M · S, D); None: the identity.
        offset: b, shape (M · S,); None: 0.
    """

    codes: NDArray[np.uint8]
    codebooks: NDArray[np.float32]
    norms: NDArray[np.float32]
    lists: NDArray[np.int32] | None
    centroids: NDArray[np.float32] | None
    matrix: NDArray[np.float32] | None
    offset: NDArray[np.float32] | None


def stored_codes(index: FaissIndex) -> StoredCodes | None:
    """The codes of an index, copied in the order of the entries; None if it has no such codes.

    PQ and IVF,PQ of 8 or 4 bits, also FastScan (x4fs), under linear transforms (OPQ, PCA) and refinements.
    """
    inner: Any = innermost(index.index)
    ivf = isinstance(inner, (faiss.IndexIVFPQ, faiss.IndexIVFPQFastScan))
    if not ivf and not isinstance(inner, (faiss.IndexPQ, faiss.IndexPQFastScan)):
        return None
    if isinstance(inner, faiss.IndexIVFPQR) or inner.pq.nbits not in (4, 8):
        return None
    transform = _linear(index.index)
    if transform is None:
        return None
    pq = inner.pq
    codebooks = faiss.vector_to_array(pq.centroids).reshape(pq.M, pq.ksub, pq.dsub).copy()
    if pq.nbits == 4 and pq.M % 2:
        codebooks = np.concatenate([codebooks, np.zeros_like(codebooks[:1])])
    codes = np.concatenate([_codes_of(innermost(part)) for part in index.parts])
    lists = centroids = None
    if ivf and inner.by_residual:
        lists = index.list_of_entries()
        centroids = inner.quantizer.reconstruct_n(0, inner.nlist)[:, : pq.M * pq.dsub]
    norms = _norms(codes, codebooks, pq.M * pq.dsub, lists, centroids)
    return StoredCodes(codes, codebooks, norms, lists, centroids, *transform)


def byte_tables(tables: NDArray[np.float32]) -> NDArray[np.float32]:
    """What each byte of a code adds, shape (W, 256), by what each codeword adds, shape (M, L)."""
    if tables.shape[1] == 256:
        return tables
    low, high = tables[0::2], tables[1::2]
    return (high[:, :, None] + low[:, None, :]).reshape(len(low), 256)


def _norms(
    codes: NDArray[np.uint8],
    codebooks: NDArray[np.float32],
    size: int,
    lists: NDArray[np.int32] | None,
    centroids: NDArray[np.float32] | None,
) -> NDArray[np.float32]:
    """‖c + r‖² = ‖c‖² + Σ_m (‖r_m‖² + 2 c_m · r_m), read from a table of each list, without decoding."""
    squares = np.square(codebooks).sum(2)  # [M, L]
    places = np.arange(codes.shape[1])
    norms = np.empty(len(codes), np.float32)
    if lists is None or centroids is None:
        _sum_into(norms, slice(0, len(codes)), byte_tables(squares), places, codes)
        return norms
    order = np.argsort(lists, kind="stable")
    bounds = np.searchsorted(lists[order], np.arange(len(centroids) + 1))
    for number, (low, high) in enumerate(pairwise(bounds.tolist())):
        if low < high:
            padded = np.zeros(codebooks.shape[0] * codebooks.shape[2], np.float32)
            padded[:size] = centroids[number]
            pieces = padded.reshape(len(codebooks), -1)  # [M, S]
            table = byte_tables(squares + 2 * np.einsum("mls,ms->ml", codebooks, pieces))
            table[0] += np.square(padded).sum()
            _sum_into(norms, order[low:high], table, places, codes)
    return norms


def _sum_into(
    norms: NDArray[np.float32], rows: Any, table: NDArray[np.float32], places: NDArray[np.int64],
    codes: NDArray[np.uint8], block: int = 65536,
) -> None:  # fmt: skip
    chosen = np.arange(len(codes))[rows]
    for first in range(0, len(chosen), block):
        some = chosen[first : first + block]
        norms[some] = table[places, codes[some]].sum(1)


def _codes_of(index: Any) -> NDArray[np.uint8]:
    """The codes of a part in the order of its entries, shape (N, W)."""
    total = int(index.ntotal)
    codes = np.empty((total, (index.pq.M * index.pq.nbits + 7) // 8), np.uint8)
    if not isinstance(index, faiss.IndexIVF):
        raw = faiss.vector_to_array(index.codes)
        codes[:] = _unpacked(index, raw, total)
        return codes
    lists = faiss.downcast_InvertedLists(inverted_lists(index))
    for number in range(index.nlist):
        if size := int(lists.list_size(number)):
            ids = faiss.rev_swig_ptr(lists.get_ids(number), size)
            codes[ids] = _unpacked(index, _bytes_of(index, lists, number, size), size)
    return codes


def _bytes_of(index: Any, lists: Any, number: int, size: int) -> NDArray[np.uint8]:
    """The bytes of an inverted list."""
    length = size * index.code_size
    if isinstance(index, faiss.IndexIVFPQFastScan):
        length = -(-size // lists.n_per_block) * lists.block_size
    return faiss.rev_swig_ptr(lists.get_codes(number), length)


def _unpacked(index: Any, raw: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Codes of shape (size, W); FastScan interleaves those of each block."""
    if not isinstance(index, (faiss.IndexIVFPQFastScan, faiss.IndexPQFastScan)):
        return raw.reshape(size, -1)
    low, high, block = _places_in_block(index)
    blocks = np.empty((-(-size // len(low)), 2 * block), np.uint8)  # one half byte each
    whole = raw[: len(blocks) * block].reshape(-1, block)
    blocks[:, 0::2], blocks[:, 1::2] = whole & 15, whole >> 4
    codes = (blocks[:, low] | blocks[:, high] << 4).astype(np.uint8)  # [blocks, entries of a block, W]
    return codes.reshape(-1, low.shape[1])[:size]


def _places_in_block(index: Any) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Which half byte of a block holds the low and the high half of each byte of each entry's code, and a block's size.

    FAISS's own packer is asked: half bytes that spell their places, a digit at a time, are unpacked.
    """
    packer = index.get_CodePacker()
    entries, width, block = int(packer.nvec), int(packer.code_size), int(packer.block_size)
    low, high = np.zeros((entries, width), np.int64), np.zeros((entries, width), np.int64)
    places = np.arange(2 * block)
    for shift in range(0, (2 * block - 1).bit_length(), 4):
        digits = (places >> shift & 15).astype(np.uint8)
        spelled = digits[0::2] | digits[1::2] << 4
        unpacked = np.empty((entries, width), np.uint8)
        packer.unpack_all(faiss.swig_ptr(spelled), faiss.swig_ptr(unpacked))
        codes = unpacked.astype(np.int64)
        low |= (codes & 15) << shift
        high |= codes >> 4 << shift
    return low, high, block


def _linear(index: faiss.Index) -> tuple[NDArray[np.float32] | None, NDArray[np.float32] | None] | None:
    """A and b of all transforms around the codes; None if one of them is not linear."""
    matrix = offset = None
    inner = faiss.downcast_index(index)
    while isinstance(inner, (faiss.IndexPreTransform, faiss.IndexRefine)):
        if isinstance(inner, faiss.IndexRefine):
            inner = faiss.downcast_index(inner.base_index)
            continue
        for number in range(inner.chain.size()):  # type: ignore[attr-defined]
            transform = faiss.downcast_VectorTransform(inner.chain.at(number))  # type: ignore[attr-defined]
            if not isinstance(transform, faiss.LinearTransform):
                return None
            a = faiss.vector_to_array(transform.A).reshape(transform.d_out, transform.d_in)
            b = faiss.vector_to_array(transform.b) if transform.have_bias else None
            offset = None if offset is None else a @ offset
            matrix = a if matrix is None else a @ matrix
            if b is not None:
                offset = b if offset is None else offset + b
        inner = faiss.downcast_index(inner.index)
    return matrix, offset
