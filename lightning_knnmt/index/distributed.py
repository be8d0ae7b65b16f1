"""One index searched by several processes, each of which holds a part of the entries."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, distributed

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.index.faiss_index import FaissIndex, nearest
from lightning_knnmt.index.filtered import FilteredIndex
from lightning_knnmt.index.search_index import Distances, Ids
from lightning_knnmt.metric import Metric


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

    def __init__(self, share: FaissIndex | FilteredIndex, group: distributed.ProcessGroup | None = None) -> None:
        self.share = share
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

    @property
    def metric(self) -> Metric:
        """By what entries are near."""
        return self.share.metric

    @property
    def nlist(self) -> int | None:
        """Inverted lists; None without lists."""
        return self.share.nlist

    @property
    def device(self) -> str:
        """Where it is searched."""
        return f"{self.share.device}, {self._size} processes"

    def search(
        self, queries: NDArray[np.float32], k: int, nprobe: int = 8, ef_search: int | None = None
    ) -> tuple[Distances, Ids]:
        """The k nearest entries of each of this process's queries among the entries of all processes.

        Args:
            queries: Shape (R, D), float32; R may differ between processes.
            k: K, the same in all processes that search, as are the other options.
            nprobe: As in `FaissIndex.search`.
            ef_search: As in `FaissIndex.search`.

        Returns:
            As `FaissIndex.search`.

        Raises:
            ValueError: The queries have another D, or the processes want different options.
        """
        if queries.ndim != 2 or queries.shape[1] != self.key_size:
            raise ValueError(f"queries have shape {queries.shape}, expected (R, {self.key_size}) as the index's keys")
        check_at_least(1, k=k, nprobe=nprobe, ef_search=ef_search)
        found = self._exchange(np.ascontiguousarray(queries, np.float32), k, nprobe, ef_search or 0)
        if found is None:
            raise RuntimeError("all processes have finished, though this one has not")
        return found

    def finish(self) -> None:
        """Answer the queries of the other processes until all have finished."""
        none = np.empty((0, self.key_size), np.float32)
        while self._exchange(none, 0, 0, 0) is not None:
            pass

    def __enter__(self) -> "DistributedIndex":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:  # after an error here, the others get one, too, once this process is gone
            self.finish()

    def _exchange(
        self, queries: NDArray[np.float32], k: int, nprobe: int, ef_search: int
    ) -> tuple[Distances, Ids] | None:
        """Search for all processes at once.

        Args:
            queries: This process's, shape (R, D).
            k: K; 0 from a process that has finished.
            nprobe: Lists that each query scans.
            ef_search: Of a graph; 0: as the index was built.

        Returns:
            This process's neighbors, shapes (R, K); None if all processes have finished.
        """
        told = self._gather(torch.tensor([len(queries), k, nprobe, ef_search])).tolist()
        wanted = {(k, nprobe, ef_search) for _, k, nprobe, ef_search in told if k > 0}
        if not wanted:
            return None
        if len(wanted) > 1:
            raise ValueError(
                f"the processes search for (k, nprobe, ef_search) {', '.join(map(str, sorted(wanted)))}, expected the "
                "same in all"
            )
        k, nprobe, ef_search = wanted.pop()
        rows = [rows for rows, *_ in told]  # [process -> its R]
        if not any(rows):
            return np.empty((0, k), np.float32), np.empty((0, k), np.int64)
        padded = torch.zeros(max(rows), self.key_size)
        padded[: len(queries)] = torch.from_numpy(queries)
        everyone = self._gather(padded)  # [processes, largest R, D]
        asked = torch.cat([theirs[:count] for theirs, count in zip(everyone, rows, strict=True)]).numpy()
        distances, ids = (
            self._gather(torch.from_numpy(array)).numpy()
            for array in self.share.search(asked, k, nprobe, ef_search or None)
        )
        start = sum(rows[: self._rank])
        ours = slice(start, start + rows[self._rank])
        return nearest([(distances[each, ours], ids[each, ours]) for each in range(self._size)], k)

    def _gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, stacked."""
        gathered = [torch.empty_like(tensor) for _ in range(self._size)]
        distributed.all_gather(gathered, tensor.contiguous(), group=self._group)
        return torch.stack(gathered)
