"""Reading the keys off a model while it runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor, nn


class KeysReached(Exception):
    """Ends a forward pass at the tap; nothing after it is needed."""


class KeyTap:
    """The most recent keys that passed the tap.

    Attributes:
        keys: Shape (B, T, D); None before the first pass.
    """

    def __init__(self) -> None:
        self.keys: Tensor | None = None

    @property
    def latest(self) -> Tensor:
        """The keys of a pass that has been."""
        assert self.keys is not None
        return self.keys


@contextmanager
def tap_input(module: nn.Module, time_first: bool = False, stop: bool = False) -> Iterator[KeyTap]:
    """Listen to the input of a module within the block.

    Args:
        module: The module whose input are the keys.
        time_first: The module's input has the shape (T, B, D).
        stop: Raise `KeysReached` as soon as the keys are there.
    """
    tap = KeyTap()

    def hear(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        tap.keys = inputs[0].transpose(0, 1) if time_first else inputs[0]  # [T, B, D] -> [B, T, D]
        if stop:
            raise KeysReached

    handle = module.register_forward_pre_hook(hear)
    try:
        yield tap
    finally:
        handle.remove()
