"""Choosing the options of a mixture on held-out text: likelihood first, BLEU between the few best."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_at_least, check_number
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.splits import source_key
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.scores import corpus_scores
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import OpenGate
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.reference import reference_steps
from lightning_knnmt.knn.settings import MixtureConfig

log = logging.getLogger(__name__)

LEAST_LOG_PROB = -20.0  # of a token in tuning: with λ = 1 a reference may have probability 0, and the mean says nothing

Options = dict[str, Any]


@dataclass(frozen=True)
class Grid:
    """Values to choose from, each tried where the retriever, the combiner or the gate has an option of that name.

    Attributes:
        k: Numbers of neighbors.
        lambda_: Shares of the neighbors, each in (0, 1).
        temperature: Temperatures, in units of distance; None: multiples of the squared distance that half of the
            nearest neighbors have, since T scales with the keys' squared norm; of similarities, whose zero means
            nothing, of the median lead of the nearest neighbor over the farthest one that is found.
        nprobe: Numbers of lists to scan.
        others: Values of further options by their names, such as the `threshold` of a gate.
        nprobe_tolerance: The smallest nprobe is taken whose best log-likelihood per token is within this many nats of
            the best of all.
        finalists: How many settings BLEU decides between.
        max_loss: Nats of log-likelihood per token that may be lost against the best of all for fewer searches: of the
            gates within it the one is taken that searches least. None: the best gate, however often it searches.
        max_tokens: Most tokens of a teacher-forced batch.
    """

    k: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32, 64])
    lambda_: list[float] = field(default_factory=lambda: [0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    temperature: list[float] | None = None
    nprobe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    others: dict[str, list[Any]] = field(default_factory=dict)
    nprobe_tolerance: float = 0.01
    finalists: int = 4
    max_loss: float | None = None
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        for name, values in {**vars(self), **self.others}.items():
            if values == []:
                raise ValueError(f"{name} is empty, expected at least one candidate")
        for name in ("k", "nprobe"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more each")
        if not all(0 < share < 1 for share in self.lambda_):
            raise ValueError(f"lambda_ is {self.lambda_}, expected values between 0 and 1, both excluded")
        if self.temperature is not None and not all(0 < value < math.inf for value in self.temperature):
            raise ValueError(f"temperature is {self.temperature}, expected more than 0 each")
        check_number(nprobe_tolerance=self.nprobe_tolerance, max_loss=self.max_loss)
        check_at_least(1, finalists=self.finalists, max_tokens=self.max_tokens)

    def values_for(self, mixture: MixtureConfig, nlist: int | None) -> dict[str, list[Any]]:
        """The values of those options that a mixture has; a temperature that is still to be found is left out.

        Args:
            mixture: Retriever, combiner and gate.
            nlist: Inverted lists of the memory; None without lists, where nprobe makes no difference.

        Raises:
            ValueError: No part has an option of `others`.
        """
        mixture.with_options(**{name: values[0] for name, values in self.others.items()})
        usual = {} if self.max_loss is None else {name: list(each) for name, each in mixture.gate.usual_options.items()}
        values: dict[str, list[Any]] = usual | {
            "k": self.k, "lambda_": self.lambda_, "nprobe": _distinct(self.nprobe, nlist), **self.others
        }  # fmt: skip
        if self.temperature is not None:
            values["temperature"] = self.temperature
        known = {name for part in mixture.parts for name in part.option_names}
        return {name: found for name, found in values.items() if name in known}


@dataclass(frozen=True)
class Tune:
    """Where and how to tune.

    Attributes:
        validation: The validation split; it shares no source with the test split.
        grid: The values to choose from.
    """

    validation: CorpusFile
    grid: Grid = Grid()


@dataclass(frozen=True)
class Candidate:
    """One choice of options and how well it predicts the references.

    Attributes:
        mixture: Retriever, combiner and gate.
        options: The options that were chosen.
        log_likelihood: Mean natural log-probability of a reference token.
        searches: Searches per reference token: less than 1 where a gate is closed for some.
        bleu: Corpus BLEU of the validation split; None if it was not a finalist.
    """

    mixture: MixtureConfig
    options: Options
    log_likelihood: float
    searches: float = 1.0
    bleu: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        figures = {name: getattr(self, name) for name in ("log_likelihood", "searches", "bleu")}
        return {"settings": self.mixture.plain, **figures}


@dataclass(frozen=True)
class Tuning:
    """The outcome of tuning.

    Attributes:
        best: The chosen mixture.
        plain_log_likelihood: That of the plain model, per token.
        plain_bleu: The plain model's BLEU.
        finalists: The choices that BLEU decided between, best first.
        tried: How many choices were compared by likelihood.
        tokens: Reference tokens that the likelihoods are means of.
    """

    best: MixtureConfig
    plain_log_likelihood: float
    plain_bleu: float
    finalists: tuple[Candidate, ...]
    tried: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            **vars(self),
            "best": self.best.plain,
            "finalists": [candidate.to_json() for candidate in self.finalists],
        }


def check_apart(validation: Sequence[Pair], test: Sequence[Pair]) -> None:
    """Make sure that nothing of the test split can decide a setting.

    Raises:
        ValueError: The splits have a source in common, case and white space aside.
    """
    tested = {source_key(pair.src) for pair in test}
    shared = [pair.src for pair in validation if source_key(pair.src) in tested]
    if shared:
        raise ValueError(
            f"{len(shared)} of {len(validation)} validation sources are in the test split too, such as "
            f"{shared[0][:80]!r}; expected none, since settings must not be chosen on test sentences"
        )


def count_stored(memory: Memory, splits: Mapping[str, Sequence[Pair]]) -> dict[str, int]:
    """How many sources of each split the datastore holds too, case and white space aside; any are warned of."""
    stored = {source_key(source) for source in memory.sources()}
    counts = {name: sum(source_key(pair.src) in stored for pair in pairs) for name, pairs in splits.items()}
    for name, count in counts.items():
        if count:
            log.warning(
                "%d of %d %s sources are in the datastore too: their scores say nothing of unseen text",
                count, len(splits[name]), name,
            )  # fmt: skip
    return counts


@torch.inference_mode()
def likelihoods(
    model: KeyedModel, memory: Memory, mixture: MixtureConfig, pairs: Sequence[Pair], grid: Grid
) -> tuple[list[Candidate], float, int]:
    """Mean log-likelihood of the references under every choice of options.

    Neighbors are retrieved once for all options of the combiner, and with the largest k only: a smaller k takes the
    first of them; where an index scores candidates again, a search for the smaller k alone may miss a few of these.
    All rows are searched, and what a gate would close is given the plain model's likelihood.

    Returns:
        The candidates, the plain model's log-likelihood, and the number of reference tokens.
    """
    values = grid.values_for(mixture, memory.nlist)
    scaled = {name: shares for name, shares in mixture.combiner.distance_options.items()
              if name in mixture.combiner.option_names and name not in values}  # fmt: skip
    if scaled:
        nearest = _nearest(model, memory, mixture, pairs, grid, values)
        values |= {name: default_temperatures(*nearest, shares) for name, shares in scaled.items()}
    ks = values.pop("k") if "k" in mixture.retriever.option_names else [None]
    searching = _choices(values, mixture.retriever.option_names)
    gating = _choices(values, mixture.gate.option_names)
    weighing = _choices(values, tuple(set(mixture.combiner.option_names) - set(mixture.retriever.option_names)))
    largest = {} if ks == [None] else {"k": max(ks)}
    always = replace(mixture, gate=OpenGate())
    opened = [always.with_options(**options, **largest).open(model, memory) for options in searching]
    gates = [mixture.gate.with_options(**options).to(model.device).eval() for options in gating]
    for gate in gates:
        gate.bind(model, memory)
    combiners = {}  # [number of k, number of other options -> combiner]
    for (number, k), (other, options) in itertools.product(enumerate(ks), enumerate(weighing)):
        both = {"k": k} if k is not None and "k" in mixture.combiner.option_names else {}
        combiners[number, other] = combiner = mixture.combiner.with_options(**options, **both).to(model.device).eval()
        combiner.bind(model, memory)
    sums = torch.zeros(len(searching), len(gating), len(ks), len(weighing), dtype=torch.float64)
    searched = torch.zeros(len(gating), dtype=torch.float64)
    plain, tokens = 0.0, 0
    for reference in reference_steps(model, pairs, grid.max_tokens):
        step = reference.step
        chosen = (step.logits.gather(1, reference.tokens[:, None]) - step.log_normalizer).squeeze(1)
        plain += float(chosen.double().sum())
        tokens += len(step)
        asked = torch.stack([gate(step) for gate in gates])  # [gate, R]
        searched += asked.sum(1).cpu()
        for place, each in enumerate(opened):
            each.begin(reference.batch)
            neighbors = each.neighbors(step)
            for (number, other), combiner in combiners.items():
                found = neighbors if (k := ks[number]) is None else neighbors.first(k)
                log_probs = combiner.token_log_probs(step, found, reference.tokens).clamp(min=LEAST_LOG_PROB)
                sums[place, :, number, other] += torch.where(asked, log_probs, chosen).double().sum(1).cpu()
    candidates = []
    for place, gate_number, number, other in itertools.product(*map(range, sums.shape)):
        options = searching[place] | gating[gate_number] | ({} if ks[number] is None else {"k": ks[number]})
        options |= weighing[other]
        mean = float(sums[place, gate_number, number, other]) / tokens
        searches = float(searched[gate_number]) / tokens
        candidates.append(Candidate(mixture.with_options(**options), options, mean, searches))
    return candidates, plain / tokens, tokens


def _choices(values: Mapping[str, list[Any]], names: Sequence[str]) -> list[Options]:
    """Every combination of the values of some options; one empty choice if none of them has values."""
    chosen = {name: found for name, found in values.items() if name in names}
    return [dict(zip(chosen, each, strict=True)) for each in itertools.product(*chosen.values())]


def _nearest(
    model: KeyedModel,
    memory: Memory,
    mixture: MixtureConfig,
    pairs: Sequence[Pair],
    grid: Grid,
    values: Mapping[str, list[Any]],
) -> tuple[Tensor, float]:
    """What temperatures scale with (`Grid`), of each reference, shape (N,), and the queries' mean squared norm."""
    first = {name: found[0] for name, found in values.items()}
    if "k" in values:
        first["k"] = max(values["k"])
    opened = replace(mixture.with_options(**first), gate=OpenGate()).open(model, memory)
    distances, norms = [], []
    for reference in reference_steps(model, pairs, grid.max_tokens):
        opened.begin(reference.batch)
        found = opened.neighbors(reference.step).distances
        nearest = found[:, 0] if found.shape[1] else found.flatten()
        if memory.metric != "l2" and found.shape[1]:
            nearest = found.masked_fill(found.isinf(), -torch.inf).amax(1) - nearest
        distances.append(nearest)
        norms.append(reference.step.queries.square().sum(1))
    return torch.cat(distances), 1.0 if memory.metric == "cos" else float(torch.cat(norms).mean())


def _distinct(nprobe: Sequence[int], nlist: int | None) -> list[int]:
    """The values that make a difference for an index of `nlist` lists, or of none, the smallest first."""
    return sorted({min(value, nlist) for value in nprobe}) if nlist else [min(nprobe)]


def default_temperatures(
    nearest: Tensor, squared_norm: float, shares: Sequence[float] = Combiner.distance_options["temperature"]
) -> list[float]:
    """Temperatures around the median distance of the nearest neighbors, rounded to two digits.

    A context that is stored as it is lies nearer than fp16 can tell; such rows say nothing about the scale.

    Args:
        nearest: What temperatures scale with: the squared L2 distance of each row's nearest neighbor, +inf where
            there is none, or the lead of the nearest neighbor in similarity, shape (N,).
        squared_norm: Mean squared norm of the queries, from which a scale is guessed if all rows are such.
        shares: Multiples of that distance.
    """
    telling = nearest[nearest.isfinite() & (nearest > 1e-5 * squared_norm)]
    median = float(telling.median()) if len(telling) else 0.1 * squared_norm
    return [float(f"{median * factor:.2g}") for factor in shares]


def tune(
    model: KeyedModel,
    memory: Memory,
    mixture: MixtureConfig,
    pairs: Sequence[Pair],
    grid: Grid = Grid(),
    decoding: Decoding = Decoding(),
    plain_bleu: float | None = None,
) -> Tuning:
    """Choose the options of a mixture on a validation split.

    The likelihood of the references under every choice follows from teacher-forced passes; the smallest sufficient
    nprobe is taken, then the best choice of each λ, and of those the best `finalists` are decoded and compared by BLEU.

    Args:
        model: The model.
        memory: Its memory.
        mixture: Retriever, combiner and gate, whose other options stay as they are.
        pairs: The validation split; never the test split.
        grid: The values to choose from.
        decoding: How finalists are decoded.
        plain_bleu: The plain model's BLEU, where it is known; None: it is decoded, too.

    Returns:
        The chosen mixture and what it was compared with.

    Raises:
        ValueError: There are no pairs.
    """
    if not pairs:
        raise ValueError("the validation split is empty, expected one pair or more to tune on")
    candidates, plain, tokens = likelihoods(model, memory, mixture, pairs, grid)
    best = max(candidate.log_likelihood for candidate in candidates)
    if plain_bleu is None:
        plain_bleu = _bleu(Translator(model, PlainModel(), decoding), pairs)
    log.info("plain model: log-likelihood %.3f, BLEU %.2f", plain, plain_bleu)
    finalists = []
    for candidate in shortlist(candidates, best - grid.nprobe_tolerance, grid.max_loss)[: grid.finalists]:
        bleu = _bleu(Translator(model, candidate.mixture.open(model, memory), decoding), pairs)
        log.info("%s: log-likelihood %.3f, BLEU %.2f", candidate.mixture, candidate.log_likelihood, bleu)
        finalists.append(replace(candidate, bleu=bleu))
    finalists.sort(key=lambda candidate: -(candidate.bleu or 0.0))
    warn_of_edges(finalists[0].options, grid.values_for(mixture, memory.nlist))
    if best <= plain:
        log.warning("no setting predicts the references better (%.3f) than the plain model (%.3f)", best, plain)
    if (finalists[0].bleu or 0.0) <= plain_bleu:
        log.warning(
            "no setting translates better (BLEU %.2f) than the plain model (%.2f)", finalists[0].bleu, plain_bleu
        )
    return Tuning(finalists[0].mixture, plain, plain_bleu, tuple(finalists), len(candidates), tokens)


def warn_of_edges(chosen: Options, values: Mapping[str, list[Any]]) -> None:
    """Say where the best value is the last one that was tried."""
    for name, tried in values.items():
        known = sorted(value for value in tried if isinstance(value, int | float))
        if len(known) > 1 and chosen.get(name) == known[-1]:
            log.warning("%s = %s is the largest value that was tried; a larger one may be better", name, known[-1])
        elif len(known) > 1 and chosen.get(name) == known[0] and name not in ("k", "nprobe"):
            log.warning("%s = %s is the smallest value that was tried; a smaller one may be better", name, known[0])


def shortlist(candidates: list[Candidate], sufficient: float, max_loss: float | None = None) -> list[Candidate]:
    """The best choice of each λ, if there is one, with the smallest nprobe and the least searches that suffice.

    Args:
        candidates: All of them.
        sufficient: The log-likelihood for which the smallest nprobe is taken.
        max_loss: What may be lost against the best log-likelihood for fewer searches; None: nothing is traded.

    Returns:
        The best first.
    """
    if max_loss is not None:
        least = max(candidate.log_likelihood for candidate in candidates) - max_loss
        enough = [candidate for candidate in candidates if candidate.log_likelihood >= least]
        fewest = min(candidate.searches for candidate in enough)
        candidates = [candidate for candidate in enough if candidate.searches == fewest]
        sufficient = min(sufficient, max(candidate.log_likelihood for candidate in candidates))
    if "nprobe" in candidates[0].options:
        nprobe = min(c.options["nprobe"] for c in candidates if c.log_likelihood >= sufficient)
        candidates = [candidate for candidate in candidates if candidate.options["nprobe"] == nprobe]
    candidates = sorted(candidates, key=lambda candidate: -candidate.log_likelihood)
    if "lambda_" in candidates[0].options:
        best_of_each: dict[float, Candidate] = {}
        for candidate in candidates:
            best_of_each.setdefault(candidate.options["lambda_"], candidate)
        candidates = list(best_of_each.values())
    return candidates


def _bleu(translator: Translator, pairs: Sequence[Pair]) -> float:
    texts = translator.translate([pair.src for pair in pairs]).texts
    return corpus_scores(texts, [pair.tgt for pair in pairs]).bleu.value
