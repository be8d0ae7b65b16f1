"""Going on where a checkpoint left off: with the same options, and with the batches that are left."""

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader

from lightning_knnmt.backbone.batch import Batch

# Options of checkpoints that were made before `backbone` was one of them
_FORMER_NAMES = {"model": "backbone.model", "src_lang": "backbone.src_lang", "tgt_lang": "backbone.tgt_lang"}
# A run may be made longer, and says itself where it trains
_MAY_CHANGE = ("schedule.max_steps", "backbone.device")


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


def check_same_options(saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with other options than those of the run that wrote a checkpoint.

    Only `schedule.max_steps` may differ. Options that the checkpoint does not name are those of a later version.

    Args:
        saved: Options of the checkpoint's run, as plain values.
        given: Options of this run.

    Raises:
        ValueError: Some differ.

    >>> check_same_options({"gamma": 1.0}, {"gamma": 3.0, "adapter_rank": 16})
    Traceback (most recent call last):
    ...
    ValueError: gamma is 3.0, expected 1.0 as in the run of the checkpoint; give the same options to resume it, ...
    """
    before, now = (_flat(options) for options in (saved, given))
    before = {_FORMER_NAMES.get(name, name): value for name, value in before.items()}
    shared = [name for name in before if name in now and name not in _MAY_CHANGE]
    different = [name for name in shared if before[name] != now[name]]
    if different:
        listed = "; ".join(f"{name} is {now[name]!r}, expected {before[name]!r}" for name in different)
        raise ValueError(
            f"{listed} as in the run of the checkpoint; give the same options to resume it, or train another model "
            "without --ckpt_path"
        )


def _flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Nested options by dotted names; those of a dispersion loss stay together."""
    flat: dict[str, Any] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and name in ("backbone", "schedule"):
            flat |= {f"{name}.{inner}": of_inner for inner, of_inner in value.items()}
        else:
            flat[name] = dict(value) if isinstance(value, Mapping) else value
    return flat
