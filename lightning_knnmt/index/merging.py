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
        outer.merge_from(inner, first)


def clear_padding(index: faiss.Index) -> None:
    """Fill with zeros what follows the codes of merged FastScan lists, so that the same entries give the same bytes.

    FastScan keeps 32 codes to a block, and merging leaves chance content in what a list does not use of its last one.
    """
    ivf = find_ivf(index)
    lists: Any = None if ivf is None else faiss.downcast_InvertedLists(inverted_lists(ivf))
    if type(lists).__name__ != "BlockInvertedLists":  # of which FAISS's type hints do not know
        return
    zeros = np.zeros(lists.packer.code_size, np.uint8)
    for number in range(lists.nlist):
        blocks, used = divmod(lists.list_size(number), lists.n_per_block)
        if used:
            content = faiss.rev_swig_ptr(lists.get_codes(number), (blocks + 1) * lists.block_size)
            last = content.reshape(blocks + 1, lists.block_size)[-1:]
            for place in range(used, lists.n_per_block):
                lists.packer.pack_1(zeros, place, last)
