"""Training batches that go on where a checkpoint left off."""

from collections.abc import Iterator
from itertools import islice

from torch.utils.data import DataLoader

from lightning_knnmt.backbone.batch import Batch


class ResumableBatches:
    """The batches of a loader; Lightning keeps their count in checkpoints and gives it back before going on.

    The order is drawn when the first batch is asked for, since Lightning sets the epoch of a resumed run only after it
    has asked for the iterator.

    Args:
        loader: A loader with a batch sampler, without workers.
    """

    def __init__(self, loader: DataLoader[tuple[list[int], list[int]]]) -> None:
        self.loader = loader
        self.batch_sampler = loader.batch_sampler  # where Lightning sets the epoch
        self._given = self._skip = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Batch]:
        assert self.batch_sampler is not None
        self._given, self._skip = self._skip, 0
        for items in islice(self.batch_sampler, self._given, None):
            self._given += 1
            yield self.loader.collate_fn([self.loader.dataset[item] for item in items])

    def state_dict(self) -> dict[str, int]:
        """How many batches of this epoch were given."""
        return {"batches": self._given}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Begin the next iteration after as many batches; after all of them, it is a new epoch."""
        self._skip = state["batches"] % len(self)
