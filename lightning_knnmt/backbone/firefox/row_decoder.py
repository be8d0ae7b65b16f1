"""Row decoding with a Firefox Translations model: cells by row, the source's keys and values by sentence."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.row_decoder import RowDecoder, States, reordered
from lightning_knnmt.backbone.tap import tap_input

if TYPE_CHECKING:
    from lightning_knnmt.backbone.seq2seq import Seq2SeqModel


class FirefoxRows(RowDecoder):
    """Rows of one sentence share its keys and values; only the cells follow the beams, and each row has its position.

    Args:
        backbone: The model.
        beams: Rows of each sentence.
    """

    grows = True

    def __init__(self, backbone: "Seq2SeqModel", beams: int) -> None:
        model: Any = backbone.model
        self.start_id = backbone.start_id
        self._backbone, self._encoder, self._decoder, self._beams = (
            backbone,
            model.model.encoder,
            model.model.decoder,
            beams,
        )
        self._cells: list[Tensor] = []  # for each block, shape (R, D)
        self._length: Tensor | None = None  # target tokens seen, shape (R,)
        self._sources: list[tuple[Tensor, Tensor]] = []  # keys and values for each block, shapes (B, H, S, d)
        self._seen: Tensor | None = None  # where there is a source token, shape (B, S)
        self._mask: Tensor | None = None  # the same for attention, shape (B, 1, 1, S); None: everywhere

    def enter(self, batch: Batch) -> None:
        """Encode B sentences, and let their rows follow those that are decoded already."""
        states = self._encoder(batch.input_ids, batch.attention_mask)[0]
        memory = self._decoder.memory(states, None)
        sources, seen = list(zip(memory.keys, memory.values, strict=True)), batch.attention_mask.bool()
        rows = self._beams * len(batch)
        length = torch.zeros(rows, dtype=torch.long, device=states.device)
        cells = [states.new_zeros(rows, states.shape[2], dtype=torch.float32) for _ in sources]
        if self._length is not None and self._seen is not None:
            sources = [
                (_stacked(keys, new_keys, 2), _stacked(values, new_values, 2))
                for (keys, values), (new_keys, new_values) in zip(self._sources, sources, strict=True)
            ]
            seen = _stacked(self._seen, seen, 1)
            length = torch.cat([self._length, length])
            cells = [torch.cat(both) for both in zip(self._cells, cells, strict=True)]
        self._sources, self._length, self._cells = sources, length, cells
        self._mask_from(seen)

    def step(self, tokens: Tensor) -> States:
        """Take the latest token of each row, shape (R,), and stand before the next."""
        if self._backbone.config.key_type == "decoder_output":
            outputs = self._run(tokens)
            return States(outputs, outputs)
        with tap_input(self._backbone.family.feed_forward(self._backbone.model)) as tap:
            outputs = self._run(tokens)
        return States(tap.latest[:, -1], outputs)

    def _run(self, tokens: Tensor) -> Tensor:
        assert self._length is not None, "sentences have entered"
        states = self._decoder.embedding(self._decoder.embed_tokens, tokens[:, None], self._length)
        for number, layer in enumerate(self._decoder.layers):
            states, self._cells[number] = layer(states, self._cells[number], *self._sources[number], self._mask)
        self._length += 1
        return states[:, -1]  # [R, 1, D] -> [R, D]

    def select(self, rows: Tensor, sentences: Tensor | None = None) -> None:
        """Let rows go on from former rows of the same sentence; what is not named leaves."""
        assert self._length is not None and self._seen is not None, "sentences have entered"
        self._cells = [reordered(cell, rows) for cell in self._cells]
        if sentences is not None:  # rows of a sentence stand at one position: nothing else moves within it
            seen = self._seen.index_select(0, sentences)
            longest = int(seen.sum(1).max()) if len(seen) else 0
            self._sources = [
                (keys.index_select(0, sentences)[:, :, :longest], values.index_select(0, sentences)[:, :, :longest])
                for keys, values in self._sources
            ]
            self._length = self._length.index_select(0, rows)
            self._mask_from(seen[:, :longest])

    def _mask_from(self, seen: Tensor) -> None:
        self._seen, self._mask = seen, None if seen.all() else seen[:, None, None]


def _stacked(first: Tensor, second: Tensor, dimension: int) -> Tensor:
    """Two tensors one behind the other, each padded with zeros to the longer one's size of a dimension."""
    size = max(first.shape[dimension], second.shape[dimension])
    after = 2 * (first.ndim - 1 - dimension)
    padded = [F.pad(each, (*[0] * after, 0, size - each.shape[dimension])) for each in (first, second)]
    return torch.cat(padded)
