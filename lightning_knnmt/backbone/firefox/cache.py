"""What decoding remembers: the recurrent cells and the source's keys and values."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SourceMemory:
    """What the decoder attends to.

    B counts sources, H heads, S source tokens, d the size of a head.

    Attributes:
        keys: For each decoder block, shape (B, H, S, d).
        values: For each decoder block, shape (B, H, S, d).
        mask: True where there is a source token, shape (B, 1, 1, S); None if there is no padding.
    """

    keys: list[Tensor]
    values: list[Tensor]
    mask: Tensor | None


class FirefoxCache:
    """The state of decoding R rows.

    Rows of one source, such as its beams, share the source's keys and values; only the cells follow the beams.

    Args:
        rows_per_source: Rows that follow each other and translate the same source.

    Attributes:
        length: Target tokens seen so far.
        cells: For each decoder block, shape (R, D), float32; empty at the beginning.
        memory: The sources; None at the beginning.
    """

    is_compileable = False

    def __init__(self, rows_per_source: int = 1) -> None:
        self.rows_per_source = rows_per_source
        self.length = 0
        self.cells: list[Tensor] = []
        self.memory: SourceMemory | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Target tokens seen so far."""
        return self.length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row i go on from row `beam_idx[i]`, shape (R,). [row -> former row]

        Raises:
            ValueError: A row would go on from one of another source.
        """
        rows = torch.arange(len(beam_idx), device=beam_idx.device)
        if not torch.equal(beam_idx // self.rows_per_source, rows // self.rows_per_source):
            raise ValueError(f"beam_idx is {beam_idx.tolist()}, expected rows of the same source for each row")
        self.cells = [cell.index_select(0, beam_idx.to(cell.device)) for cell in self.cells]

    def batch_select_indices(self, rows: Tensor) -> None:
        """Keep some rows, all of each source that stays. [row -> former row]"""
        self.cells = [cell.index_select(0, rows.to(cell.device)) for cell in self.cells]
        if self.memory is not None:
            sources = rows[:: self.rows_per_source] // self.rows_per_source
            keys, values = ([each[sources] for each in part] for part in (self.memory.keys, self.memory.values))
            mask = None if self.memory.mask is None else self.memory.mask[sources]
            self.memory = SourceMemory(keys, values, mask)

    def crop(self, *_: object) -> None:
        """Refused: what a cell has forgotten does not come back.

        Raises:
            ValueError: Always.
        """
        raise ValueError("the cache of an SSRU decoder cannot go back, expected decoding without rollback")
