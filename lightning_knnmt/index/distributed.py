"""One index searched by several processes, each of which holds a part of the entries."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from lightning_knnmt.index.faiss_index import FaissIndex, nearest


class DistributedIndex:
    """An index over a whole datastore, of which this process has a share (`open_parts`).

    Processes search together: each `search` answers the queries of all, which may differ in number, and gives every
    process the neighbors of its own. A process that has no more queries calls `finish`, or the others would wait for
    it; used as a context manager, the index does so at the end of the block.

    Args:
        share: This process's entries.
        group: The processes that search together, with the backend gloo; None: all processes, which must then make
            their indexes at the same time.

    Raises:
        ValueError: The shares do not make up a whole.
    """

    def __init__(self, share: FaissIndex, group: distributed.ProcessGroup | None = None) -> None:
        self.share, self._nprobe = share, 1
        self._group = distributed.new_group(backend="gloo") if group is None else group
        self._size = distributed.get_world_size(self._group)
        self._rank = distributed.get_rank(self._group)
        told = self._gather(torch.tensor([share.first, len(share), share.key_size]))
        self._entries = sum(int(entries) for _, entries, _ in told)
        ends = [0, *(int(first + entries) for first, entries, _ in told)]
        if any(int(first) != end for (first, *_), end in zip(told, ends, strict=False)):
            raise ValueError(
                f"the processes hold entries {', '.join(f'{int(first)} to {int(first + n)}' for first, n, _ in told)}, "
                "expected shares that follow each other; open them with open_parts"
            )

    def __len__(self) -> int:
        return self._entries

    @property
    def key_size(self) -> int:
        """D."""
        return self.share.key_size

    def set_nprobe(self, nprobe: int) -> None:
        """Choose how many lists a query scans in every process; to be the same in all that search."""
        self.share.set_nprobe(nprobe)
        self._nprobe = nprobe

    def search(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """The k nearest entries of each of this process's queries among the entries of all processes.

        Args:
            queries: Shape (R, D), float32; R may differ between processes.
            k: K, the same in all processes that search.

        Returns:
            As `FaissIndex.search`.

        Raises:
            ValueError: The queries have another D, or the processes want different K or numbers of lists.
        """
        self.share.check(queries)
        if k < 1:
            raise ValueError(f"k is {k}, expected 1 or more")
        found = self._exchange(np.ascontiguousarray(queries, np.float32), k)
        if found is None:
            raise RuntimeError("all processes have finished, though this one has not")
        return found

    def finish(self) -> None:
        """Answer the queries of the other processes until all have finished."""
        none = np.empty((0, self.key_size), np.float32)
        while self._exchange(none, 0) is not None:
            pass

    def __enter__(self) -> "DistributedIndex":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an error here, the others get one, too, once this process is gone
            self.finish()

    def _exchange(self, queries: NDArray[np.float32], k: int) -> tuple[NDArray[np.float32], NDArray[np.int64]] | None:
        """Search for all processes at once.

        Args:
            queries: This process's, shape (R, D).
            k: K; 0 from a process that has finished.

        Returns:
            This process's neighbors, shapes (R, K); None if all processes have finished.
        """
        told = self._gather(torch.tensor([len(queries), k, self._nprobe])).tolist()
        wanted = {(k, nprobe) for _, k, nprobe in told if k > 0}
        if not wanted:
            return None
        if len(wanted) > 1:
            raise ValueError(
                f"the processes search for (k, nprobe) {', '.join(map(str, sorted(wanted)))}, expected the same in all"
            )
        k, nprobe = wanted.pop()
        self.share.set_nprobe(nprobe)
        rows = [rows for rows, *_ in told]  # [process -> its R]
        if not any(rows):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        padded = torch.zeros(max(rows), self.key_size)
        padded[: len(queries)] = torch.from_numpy(queries)
        everyone = self._gather(padded)  # [processes, largest R, D]
        asked = torch.cat([theirs[:count] for theirs, count in zip(everyone, rows, strict=True)]).numpy()
        distances, ids = (self._gather(torch.from_numpy(array)).numpy() for array in self.share.search(asked, k))
        start = sum(rows[: self._rank])
        ours = slice(start, start + rows[self._rank])
        return nearest([(distances[each, ours], ids[each, ours]) for each in range(self._size)], k)

    def _gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked."""
        gathered = [torch.empty_like(tensor) for _ in range(self._size)]
        distributed.all_gather(gathered, tensor.contiguous(), group=self._group)
        return torch.stack(gathered)
