"""Parts of an index made into one."""

from typing import Any

import faiss
import numpy as np

from lightning_knnmt.index.layers import find_ivf, inverted_lists


def merge(index: faiss.Index, part: faiss.Index, first: int) -> None:
    """Append the entries of a part, which is emptied, as if they had been added one by one.

    Args:
        index: One with inverted lists, read from a file.
        part: Trained as it, read from a file.
        first: The entry number of the part's first entry: how many the index has.
    """
    outer, inner = faiss.downcast_index(index), faiss.downcast_index(part)
    if isinstance(outer, faiss.IndexRefine) and isinstance(inner, faiss.IndexRefine):
        merge(outer.base_index, inner.base_index, first)
        outer.refine_index.merge_from(inner.refine_index)
        outer.ntotal = outer.base_index.ntotal
    else:
        _append_whole_blocks(outer, inner, first)
        outer.merge_from(inner, first)


def reserve(index: faiss.Index, entries: int) -> None:
    """Make room for the codes of so many entries, which would be in memory twice whenever their number has doubled.

    Codes in inverted lists are in pieces small enough.

    Args:
        index: Trained.
        entries: How many it will have.
    """
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexPreTransform):
        reserve(inner.index, entries)
    elif isinstance(inner, faiss.IndexRefine):
        reserve(inner.base_index, entries)
        reserve(inner.refine_index, entries)
    elif isinstance(inner, faiss.IndexHNSW):
        reserve(inner.storage, entries)
    elif isinstance(inner, faiss.IndexFlatCodes):
        inner.codes.resize(entries * inner.code_size)
        inner.codes.resize(inner.ntotal * inner.code_size)  # which keeps the room


def _append_whole_blocks(outer: faiss.Index, inner: faiss.Index, first: int) -> None:
    """Append to those FastScan lists at whose end FAISS would write beyond its memory.

    FAISS 1.15 copies too many blocks where a list's number of entries is a multiple of a block's number of bytes
    (`BlockInvertedLists::add_entries`).
    """
    to, lists = (_blocks(index) for index in (outer, inner))
    if to is None:
        return
    for number in range(to.nlist):
        there, new = to.list_size(number), lists.list_size(number)
        if there and new and there % to.block_size == 0:
            to.resize(number, there + new)
            ids = faiss.rev_swig_ptr(to.get_ids(number), there + new)
            ids[there:] = faiss.rev_swig_ptr(lists.get_ids(number), new) + first
            start, size = (-(-entries // to.n_per_block) * to.block_size for entries in (there, new))
            codes = faiss.rev_swig_ptr(to.get_codes(number), start + size)
            codes[start:] = faiss.rev_swig_ptr(lists.get_codes(number), size)
            lists.resize(number, 0)


def _blocks(index: faiss.Index) -> Any:
    """The lists of FastScan codes, of which FAISS's type hints do not know; None if there are none."""
    ivf = find_ivf(index)
    lists: Any = None if ivf is None else faiss.downcast_InvertedLists(inverted_lists(ivf))
    return lists if type(lists).__name__ == "BlockInvertedLists" else None


def clear_padding(index: faiss.Index) -> None:
    """Fill with zeros what follows the codes of merged FastScan lists, so that the same entries give the same bytes.

    FastScan keeps 32 codes to a block, and merging leaves chance content in what a list does not use of its last one.
    """
    if (lists := _blocks(index)) is None:
        return
    zeros = np.zeros(lists.packer.code_size, np.uint8)
    for number in range(lists.nlist):
        blocks, used = divmod(lists.list_size(number), lists.n_per_block)
        if used:
            content = faiss.rev_swig_ptr(lists.get_codes(number), (blocks + 1) * lists.block_size)
            last = content.reshape(blocks + 1, lists.block_size)[-1:]
            for place in range(used, lists.n_per_block):
                lists.packer.pack_1(zeros, place, last)
