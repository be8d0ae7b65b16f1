"""Greedy and beam search that give what `generate` gives; finished sentences leave at once, and waiting ones enter."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.decoding.beams import Beams
from lightning_knnmt.decoding.prediction import Predictor
from lightning_knnmt.decoding.sequences import Greedy, Sequences


@torch.inference_mode()
def search(predictor: Predictor, waiting: "Waiting") -> dict[int, Tensor]:
    """Token ids of the best translation of each sentence, the start and the end included, by the sentence's number.

    Args:
        predictor: A model, a mixture and rules; its decoder has no rows yet.
        waiting: The sentences.
    """
    spans, options = predictor.spans, predictor.options
    sequences: Sequences = (Beams if options.beams > 1 else Greedy)(options, predictor.decoder.start_id)
    found: dict[int, Tensor] = {}
    while len(sequences) or waiting.left:
        for batch, numbers in waiting.entering(len(sequences)):
            predictor.enter(batch)
            sequences.enter(numbers.to(options.eos_ids.device))
        best = predictor.best(sequences)
        with spans.span("beams", len(sequences)):
            advance = sequences.advance(best)
        with spans.span("bookkeeping", len(sequences)):
            found.update(advance.done)
            if options.beams > 1 or advance.sentences is not None:
                predictor.select(advance.rows, advance.sentences)
    return found


class Waiting:
    """Batches of sentences that enter a search as others leave it.

    Args:
        batches: The sentences in the order in which they enter, each batch with the numbers of its sentences.
        room: Sentences that are decoded at a time.
    """

    def __init__(self, batches: Iterator[tuple[Batch, Tensor]], room: int) -> None:
        self._batches, self._room = batches, room
        self._next = next(batches, None)

    @property
    def left(self) -> bool:
        """Whether there are any."""
        return self._next is not None

    def entering(self, decoded: int) -> Iterator[tuple[Batch, Tensor]]:
        """The batches for which there is room beside so many sentences that are decoded."""
        while self._next is not None and (not decoded or decoded + len(self._next[0]) <= self._room):
            decoded += len(self._next[0])
            yield self._next
            self._next = next(self._batches, None)
