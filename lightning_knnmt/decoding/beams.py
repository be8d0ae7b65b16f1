"""Running and finished sequences of beam search, as Hugging Face's `generate` keeps them."""

import torch
from torch import Tensor

from lightning_knnmt.decoding.options import SearchOptions
from lightning_knnmt.decoding.prediction import Best
from lightning_knnmt.decoding.sequences import Advance, Sequences, longer

NEVER = -1e9  # score of what is no candidate, as in Hugging Face's beam search


class Beams(Sequences):
    """k running sequences of each of b sentences, and the finished ones that count.

    Each sentence has a length of its own, so that others may enter while it is decoded.

    Args:
        options: Beam size, length and rules.
        start: The first token.
    """

    def __init__(self, options: SearchOptions, start: int) -> None:
        super().__init__(options, start)
        k, device = options.beams, options.eos_ids.device
        self._scores = torch.empty(0, k, device=device)
        self._finished_scores = torch.empty(0, k, device=device)
        self._finished = torch.empty(0, k, dtype=torch.bool, device=device)
        self._found = torch.empty(0, 1, dtype=torch.long, device=device)  # the best finished one, shape (b, T)
        self._found_length = torch.empty(0, dtype=torch.long, device=device)
        self.considered = max(2, 1 + len(options.eos_ids)) * k

    def enter(self, numbers: Tensor) -> None:
        """Begin sentences of some numbers, shape (B,)."""
        super().enter(numbers)
        new = len(numbers), self._options.beams
        scores = self._scores.new_full(new, NEVER)
        scores[:, 0] = 0.0  # or all beams would begin alike
        self._scores = torch.cat([self._scores, scores])
        self._finished_scores = torch.cat([self._finished_scores, torch.full_like(scores, NEVER)])
        self._finished = torch.cat([self._finished, self._finished.new_zeros(new)])
        self._found = torch.cat([self._found, self._found.new_zeros(len(numbers), self._found.shape[1])])
        self._found_length = torch.cat([self._found_length, self._found_length.new_zeros(len(numbers))])

    def advance(self, best: Best) -> Advance:
        """Go on with the best continuations of each sentence."""
        options, (sentences, k, _) = self._options, self._tokens.shape
        each = best.scores.shape[1]
        totals = (best.scores.view(sentences, k, each) + self._scores[:, :, None]).flatten(1)  # [b, k * each]
        scores, places = totals.topk(min(self.considered, totals.shape[1]))
        beam, tokens = places // each, best.tokens.view(sentences, -1).gather(1, places)
        last = self._lengths == options.max_new_tokens  # the start counts as one
        ends = torch.isin(tokens, options.eos_ids) | last[:, None]
        running = scores + ends * NEVER
        self._scores, kept = running.topk(k)
        if ends.any():
            self._finish(beam, tokens, scores / self._penalty()[:, None], ends)
        self._write(beam.gather(1, kept), tokens.gather(1, kept))
        over = self._over() | last
        rows = beam.gather(1, kept) + k * torch.arange(sentences, device=beam.device)[:, None]  # [b, k]
        self._lengths = self._lengths + 1
        if not over.any():
            return Advance([], rows.flatten(), None)
        places = over.nonzero().flatten()
        done = [
            (number, row[:length])
            for number, row, length in zip(
                self.numbers[places].tolist(), self._found[places], self._found_length[places].tolist(), strict=True
            )
        ]
        stay = (~over).nonzero().flatten()
        self._leave(stay)
        return Advance(done, rows[stay].flatten(), stay)

    def _penalty(self, hoped_for: bool = False) -> Tensor:
        """Length to the power of the penalty, float32, shape (b,)."""
        lengths = torch.full_like(self._lengths, self._options.max_new_tokens) if hoped_for else self._lengths
        return (lengths.double() ** self._options.length_penalty).float()

    def _finish(self, beam: Tensor, tokens: Tensor, scores: Tensor, ends: Tensor) -> None:
        """Take what has ended among the best k candidates of each sentence; all of shape (b, considered)."""
        k = self._options.beams
        ends = ends.clone()
        ends[:, k:] = False  # the rest are there only so that k go on
        merged = torch.cat([self._finished_scores, scores + ~ends * NEVER], 1)
        self._finished_scores, chosen = merged.topk(k)
        self._finished = torch.cat([self._finished, ends], 1).gather(1, chosen)
        better = (chosen[:, 0] >= k).nonzero().flatten()
        if len(better):
            which = chosen[better, 0] - k
            rows = longer(self._tokens[better, beam[better, which]], int(self._lengths[better].max()) + 1)
            rows.scatter_(1, self._lengths[better, None], tokens[better, which, None])
            self._found = longer(self._found, rows.shape[1])
            self._found[better, : rows.shape[1]] = rows
            self._found_length[better] = self._lengths[better] + 1

    def _over(self) -> Tensor:
        """Whether a sentence's search is over, shape (b,), by the rules of `generate`."""
        options, full = self._options, self._finished.all(1)
        if options.early_stopping is True:
            return full
        never = options.early_stopping == "never" and options.length_penalty > 0
        possible = self._scores[:, 0] / self._penalty(hoped_for=never)
        return possible <= torch.where(full, self._finished_scores.amin(1), NEVER)

    def _leave(self, stay: Tensor) -> None:
        super()._leave(stay)
        self._scores, self._finished_scores = self._scores[stay], self._finished_scores[stay]
        self._finished, self._found = self._finished[stay], self._found[stay]
        self._found_length = self._found_length[stay]
