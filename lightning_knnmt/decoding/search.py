"""Greedy and beam search that give what Hugging Face's `generate` gives, and let finished sentences leave the batch."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    NoBadWordsLogitsProcessor,
    SuppressTokensLogitsProcessor,
)

from lightning_knnmt.backbone.keyed_model import StepwiseDecoder
from lightning_knnmt.knn.step import Step

NEVER = -1e9  # score of what is no candidate, as in Hugging Face's beam search

# Options of `generate` that are honoured here, and settings of a model that must be unset for that.
OWN_OPTIONS = frozenset({
    "bad_words_ids", "begin_suppress_tokens", "early_stopping", "forced_bos_token_id", "forced_eos_token_id",
    "length_penalty", "min_length", "min_new_tokens", "no_repeat_ngram_size", "repetition_penalty", "suppress_tokens",
})  # fmt: skip
FOREIGN_SETTINGS = (
    "do_sample", "guidance_scale", "encoder_repetition_penalty", "encoder_no_repeat_ngram_size", "stop_strings",
    "max_time", "penalty_alpha", "watermarking_config", "renormalize_logits",
)  # fmt: skip

Mix = Callable[[Step], Step]


@dataclass(frozen=True)
class SearchOptions:
    """What decides the outcome of a search.

    Attributes:
        beams: Beam size; 1 is greedy.
        max_new_tokens: Longest translation.
        eos_ids: Tokens that end one, shape (number,).
        pad_id: What follows its end.
        length_penalty: Power of the length that scores are divided by.
        early_stopping: As in `generate`.
        banned: Tokens that are never produced, shape (number,).
        processors: Other rules of Hugging Face, for log-probabilities of shape (R, V).
    """

    beams: int
    max_new_tokens: int
    eos_ids: Tensor
    pad_id: int
    length_penalty: float
    early_stopping: bool | str
    banned: Tensor
    processors: LogitsProcessorList


def search_options(model: Any, options: dict[str, Any], beams: int, max_new_tokens: int) -> SearchOptions | None:
    """The options of this search; None if something is asked for that only `generate` can do.

    Args:
        model: The Hugging Face model, with its generation configuration.
        options: Of `generate`, which override that.
        beams: Beam size.
        max_new_tokens: Longest translation.
    """
    config = GenerationConfig.from_dict({**model.generation_config.to_dict(), **options})
    unset = all(getattr(config, name, None) in (None, False, 0, 1) for name in FOREIGN_SETTINGS)
    if set(options) - OWN_OPTIONS or not unset or config.eos_token_id is None or config.use_cache is False:
        return None
    config.num_beams, config.max_new_tokens, config.max_length = beams, max_new_tokens, 1 + max_new_tokens
    eos_ids = torch.tensor(config.eos_token_id, device=model.device).reshape(-1)
    config._eos_token_tensor = eos_ids
    banned: list[int] = []
    others = LogitsProcessorList()
    for processor in model._get_logits_processor(
        config, 1, logits_processor=LogitsProcessorList(), device=model.device
    ):
        if type(processor) is SuppressTokensLogitsProcessor:
            banned += config.suppress_tokens
        elif type(processor) is NoBadWordsLogitsProcessor and all(len(word) == 1 for word in config.bad_words_ids):
            banned += [word[0] for word in config.bad_words_ids if word[0] not in eos_ids.tolist()]
        else:
            others.append(processor)
    pad_id = config.pad_token_id
    if pad_id is None or (pad_id == 0 and beams > 1):  # beam search of `generate` takes 0 for none
        pad_id = int(eos_ids[0])
    return SearchOptions(
        beams=beams,
        max_new_tokens=max_new_tokens,
        eos_ids=eos_ids,
        pad_id=pad_id,
        length_penalty=1.0 if config.length_penalty is None else float(config.length_penalty),
        early_stopping=False if config.early_stopping is None else config.early_stopping,
        banned=torch.tensor(sorted(set(banned)), dtype=torch.long, device=model.device),
        processors=others,
    )


@torch.inference_mode()
def search(decoder: StepwiseDecoder, mix: Mix, sentences: int, options: SearchOptions) -> Tensor:
    """Token ids of the best translation of each sentence, shape (B, 1 + T), as `generate` gives them.

    Args:
        decoder: The state of decoding B × beams rows.
        mix: Turns the model's step into the mixture's.
        sentences: B.
        options: Beam size, length and rules.
    """
    found = _beams(decoder, mix, sentences, options) if options.beams > 1 else _greedy(decoder, mix, sentences, options)
    longest = max(map(len, found))
    rows = [torch.cat([row, row.new_full((longest - len(row),), options.pad_id)]) for row in found]
    return torch.stack(rows)


def _scored(decoder: StepwiseDecoder, mix: Mix, sequences: Tensor, sentence: Tensor, options: SearchOptions) -> Step:
    """The next step of R sequences: logits whose forbidden tokens are −inf, and their normaliser."""
    queries, logits = decoder.step(sequences)
    step = mix(Step(queries, logits.float(), sentence, writable=True))
    normalizer, logits = step.log_normalizer, step.logits  # what is forbidden leaves its share to nobody, as there
    if len(options.banned):
        logits[:, options.banned] = -torch.inf
    if options.processors:
        log_probs = options.processors(cast(LongTensor, sequences), logits - normalizer)
        return Step(queries, log_probs, sentence, normalizer=torch.zeros_like(normalizer))
    return step


def _greedy(decoder: StepwiseDecoder, mix: Mix, sentences: int, options: SearchOptions) -> list[Tensor]:
    device = options.eos_ids.device
    active = torch.arange(sentences, device=device)  # [row -> sentence]
    sequences = torch.full((sentences, 1), decoder.start_id, device=device)
    found: list[Tensor] = [sequences[0]] * sentences
    for _ in range(options.max_new_tokens):
        best = _scored(decoder, mix, sequences, active, options).logits.argmax(1)
        sequences = torch.cat([sequences, best[:, None]], 1)
        going_on = ~torch.isin(best, options.eos_ids)
        if not going_on.all():
            for row in (~going_on).nonzero().flatten().tolist():
                found[int(active[row])] = sequences[row]
            rows = going_on.nonzero().flatten()
            active, sequences = active[rows], sequences[rows]
            if not len(active):
                return found
            decoder.select(rows, dropped=True)
    for row, sentence in enumerate(active.tolist()):
        found[sentence] = sequences[row]
    return found


def _beams(decoder: StepwiseDecoder, mix: Mix, sentences: int, options: SearchOptions) -> list[Tensor]:
    """Beam search; b counts the sentences that are still searched, and k is the beam size."""
    k, device = options.beams, options.eos_ids.device
    candidates = max(2, 1 + len(options.eos_ids)) * k
    active = torch.arange(sentences, device=device)  # [place -> sentence]
    running = torch.full((sentences, k, 1), decoder.start_id, device=device)  # [b, k, T]
    scores = torch.full((sentences, k), NEVER, device=device)
    scores[:, 0] = 0.0  # or all beams would begin alike
    finished = _Finished.none(sentences, k, device)
    found: list[Tensor] = [running[0, 0]] * sentences
    for length in range(1, options.max_new_tokens + 1):
        sentence = active.repeat_interleave(k)
        step = _scored(decoder, mix, running.flatten(0, 1), sentence, options)
        top = step.logits.topk(candidates, 1)  # the best of a sentence are among the best of each of its beams
        of_rows = top.values - step.log_normalizer + scores.flatten()[:, None]  # [b * k, candidates]
        best, places = of_rows.view(len(active), -1).topk(candidates, 1)  # [b, candidates]
        beam = places // candidates  # [candidate -> beam]
        tokens = top.indices.view(len(active), -1).gather(1, places)
        sequences = torch.cat(
            [running.gather(1, beam[..., None].expand(-1, -1, running.shape[2])), tokens[..., None]], 2
        )
        ends = torch.isin(tokens, options.eos_ids)
        if length == options.max_new_tokens:
            ends = torch.ones_like(ends)
        scores, kept = (best + ends * NEVER).topk(k, 1)
        running = sequences.gather(1, kept[..., None].expand(-1, -1, sequences.shape[2]))
        finished.add(sequences, best / length**options.length_penalty, ends, options.early_stopping is True)
        done = finished.cannot_improve(scores[:, 0], length, options)
        rows = beam.gather(1, kept) + k * torch.arange(len(active), device=device)[:, None]  # [b, k]
        if done.any() or length == options.max_new_tokens:
            over = done if length < options.max_new_tokens else torch.ones_like(done)
            for place in over.nonzero().flatten().tolist():
                found[int(active[place])] = finished.best(place)
            stay = (~over).nonzero().flatten()
            if not len(stay):
                return found
            active, running, scores, rows = active[stay], running[stay], scores[stay], rows[stay]
            finished = finished.rows(stay)
            decoder.select(rows.flatten(), dropped=True)
        elif not torch.equal(rows.flatten(), torch.arange(rows.numel(), device=device)):
            decoder.select(rows.flatten(), dropped=False)
    return found


@dataclass
class _Finished:
    """The best finished translations of b sentences, k each, and what they are worth.

    Attributes:
        sequences: Padded with −1, shape (b, k, T).
        scores: Log-probability divided by a power of the length, shape (b, k).
        ended: Whether there is one, shape (b, k).
    """

    sequences: Tensor
    scores: Tensor
    ended: Tensor

    @classmethod
    def none(cls, sentences: int, k: int, device: torch.device) -> "_Finished":
        shape = sentences, k
        empty = torch.full((*shape, 1), -1, device=device)
        return cls(empty, torch.full(shape, NEVER, device=device), torch.zeros(shape, dtype=torch.bool, device=device))

    def add(self, sequences: Tensor, scores: Tensor, ends: Tensor, only_until_full: bool) -> None:
        """Take candidates (b, candidates, T) of which the best k have ended."""
        k = self.scores.shape[1]
        ends = ends.clone()
        ends[:, k:] = False  # the rest are there only so that k go on
        if only_until_full:
            scores = scores + self.ended.all(1, keepdim=True) * NEVER
        scores = scores + ~ends * NEVER
        grown = torch.nn.functional.pad(self.sequences, (0, sequences.shape[2] - self.sequences.shape[2]), value=-1)
        self.scores, places = torch.cat([self.scores, scores], 1).topk(k, 1)
        merged = torch.cat([grown, sequences], 1)
        self.sequences = merged.gather(1, places[..., None].expand(-1, -1, merged.shape[2]))
        self.ended = torch.cat([self.ended, ends], 1).gather(1, places)

    def cannot_improve(self, best_running: Tensor, length: int, options: SearchOptions) -> Tensor:
        """Whether a sentence's search is over, shape (b,), by the rules of `generate`."""
        never = options.early_stopping == "never" and options.length_penalty > 0
        hoped_for = options.max_new_tokens if never else length
        best_possible = best_running / hoped_for**options.length_penalty
        worst = torch.where(self.ended, self.scores.amin(1, keepdim=True), NEVER)  # [b, k]
        over = ~(best_possible[:, None] > worst).any(1)
        return over | self.ended.all(1) if options.early_stopping is True else over

    def best(self, place: int) -> Tensor:
        """The best translation of a sentence."""
        sequence = self.sequences[place, 0]
        return sequence[sequence >= 0]

    def rows(self, places: Tensor) -> "_Finished":
        """Those of some sentences."""
        return _Finished(self.sequences[places], self.scores[places], self.ended[places])
