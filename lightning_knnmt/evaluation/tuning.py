"""Choosing k, λ, T and nprobe on held-out text: likelihood first, BLEU between the few best."""

import itertools
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.batching import token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.data.splits import source_key
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.scores import corpus_scores
from lightning_knnmt.index.memory import KnnSearch, KnnSettings
from lightning_knnmt.knn.probability import knn_log_weights

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Grid:
    """The settings to choose from.

    Attributes:
        k: Numbers of neighbors.
        lambda_: Shares of the neighbors, each in (0, 1).
        temperature: Temperatures, in units of squared distance; None: multiples of the distance that half of the
            nearest neighbors have, since T scales with the keys' squared norm.
        nprobe: Numbers of lists to scan.
        nprobe_tolerance: The smallest nprobe is taken whose best log-likelihood per token is within this many nats of
            the best of all.
        finalists: How many settings BLEU decides between.
        max_tokens: Most tokens of a teacher-forced batch.
    """

    k: list[int] = field(default_factory=lambda: [2, 4, 8, 16, 32])
    lambda_: list[float] = field(default_factory=lambda: [0.3, 0.4, 0.5, 0.6, 0.7, 0.8])
    temperature: list[float] | None = None
    nprobe: list[int] = field(default_factory=lambda: [1, 2, 4, 8, 16])
    nprobe_tolerance: float = 0.01
    finalists: int = 4
    max_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("k", "lambda_", "temperature", "nprobe"):
            if getattr(self, name) == []:
                raise ValueError(f"{name} is empty, expected at least one candidate")
        for name in ("k", "nprobe"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more each")
        if not all(0 < share < 1 for share in self.lambda_):
            raise ValueError(f"lambda_ is {self.lambda_}, expected values between 0 and 1, both excluded")
        if self.temperature is not None and not all(0 < value < math.inf for value in self.temperature):
            raise ValueError(f"temperature is {self.temperature}, expected more than 0 each")
        if not self.nprobe_tolerance >= 0:
            raise ValueError(f"nprobe_tolerance is {self.nprobe_tolerance}, expected 0 or more")
        for name in ("finalists", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")


@dataclass(frozen=True)
class Tune:
    """Where and how to tune.

    Attributes:
        validation: The validation split; it shares no source with the test split.
        grid: The settings to choose from.
    """

    validation: CorpusFile
    grid: Grid = Grid()


@dataclass(frozen=True)
class ReferenceStates:
    """Teacher-forced states of N reference tokens.

    Attributes:
        queries: Keys, shape (N, D).
        tokens: The references' tokens, shape (N,).
        log_probs: The plain model's log-probability of them, shape (N,).
    """

    queries: Tensor
    tokens: Tensor
    log_probs: Tensor


@dataclass(frozen=True)
class Candidate:
    """One setting and how well it predicts the references.

    Attributes:
        settings: k, λ, T and nprobe.
        log_likelihood: Mean natural log-probability of a reference token.
        bleu: Corpus BLEU of the validation split; None if it was not a finalist.
    """

    settings: KnnSettings
    log_likelihood: float
    bleu: float | None = None


@dataclass(frozen=True)
class Tuning:
    """The outcome of tuning.

    Attributes:
        best: The chosen setting.
        plain_log_likelihood: That of the plain model, per token.
        plain_bleu: The plain model's BLEU.
        finalists: The settings that BLEU decided between, best first.
        tried: How many settings were compared by likelihood.
        tokens: Reference tokens that the likelihoods are means of.
    """

    best: KnnSettings
    plain_log_likelihood: float
    plain_bleu: float
    finalists: tuple[Candidate, ...]
    tried: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


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


def count_stored(datastore: Datastore, splits: Mapping[str, Sequence[Pair]]) -> dict[str, int]:
    """How many sources of each split the datastore holds too, case and white space aside; any are warned of."""
    stored = {source_key(source) for source in datastore.sources()}
    counts = {name: sum(source_key(pair.src) in stored for pair in pairs) for name, pairs in splits.items()}
    for name, count in counts.items():
        if count:
            log.warning(
                "%d of %d %s sources are in the datastore too: their scores say nothing of unseen text",
                count, len(splits[name]), name,
            )  # fmt: skip
    return counts


@torch.inference_mode()
def reference_states(backbone: KeyedModel, pairs: Sequence[Pair], max_tokens: int) -> ReferenceStates:
    """States, tokens and plain log-probabilities of the references of some pairs, in one teacher-forced pass.

    A first token that decoding forces is left out: nothing is predicted there.
    """
    sources, targets = backbone.tokenize([pair.src for pair in pairs], [pair.tgt for pair in pairs])
    lengths = [max(len(src), len(tgt)) for src, tgt in zip(sources, targets, strict=True)]
    queries, tokens, log_probs = [], [], []
    for numbers in token_budget_batches(lengths, max_tokens):
        batch = collate([sources[n] for n in numbers], [targets[n] for n in numbers], backbone.pad_id)
        batch = batch.to(backbone.device)
        assert batch.labels is not None
        keys, logits = backbone.keys_and_logits(batch)
        mask = batch.target_mask
        if backbone.start.forced_id is not None:
            mask[:, 0] = False
        labels = batch.labels[mask]
        queries.append(keys[mask].float())
        tokens.append(labels)
        log_probs.append(-F.cross_entropy(logits[mask].float(), labels, reduction="none"))
    return ReferenceStates(torch.cat(queries), torch.cat(tokens), torch.cat(log_probs))


def likelihoods(search: KnnSearch, states: ReferenceStates, grid: Grid) -> list[Candidate]:
    """Mean log-likelihood of the references under every setting; neighbors are retrieved once for each nprobe.

    A smaller k takes the first of the largest k's neighbors; where an index scores candidates again, a search for the
    smaller k alone may miss a few of these.
    """
    candidates = []
    temperatures = grid.temperature
    for nprobe in _distinct(grid.nprobe, search.index.nlist):
        neighbors = search.retriever(max(grid.k), nprobe).retrieve(states.queries)
        if temperatures is None:
            squared_norm = float(states.queries.square().sum(1).mean())
            temperatures = default_temperatures(neighbors.distances, squared_norm)
        match = neighbors.values == states.tokens[:, None]  # [N, K]
        for k, temperature in itertools.product(grid.k, temperatures):
            weights = knn_log_weights(neighbors.first(k).distances, temperature).exp()
            log_knn = (weights * match[:, :k]).sum(1).log()  # [N]
            found = weights.sum(1) > 0  # rows without neighbors are left to the model
            for lambda_ in grid.lambda_:
                mixed = torch.logaddexp(log_knn + math.log(lambda_), states.log_probs + math.log1p(-lambda_))
                mean = torch.where(found, mixed, states.log_probs).double().mean()
                candidates.append(Candidate(KnnSettings(k, lambda_, temperature, nprobe), float(mean)))
    return candidates


def _distinct(nprobe: Sequence[int], nlist: int | None) -> list[int]:
    """The values that make a difference for an index of `nlist` lists, or of none, the smallest first."""
    return sorted({min(value, nlist) for value in nprobe}) if nlist else [min(nprobe)]


def default_temperatures(distances: Tensor, squared_norm: float) -> list[float]:
    """Six temperatures around the median distance of the nearest neighbors, rounded to two digits.

    A context that is stored as it is lies nearer than fp16 can tell; such rows say nothing about the scale.

    Args:
        distances: Squared L2, shape (N, K).
        squared_norm: Mean squared norm of the queries, from which a scale is guessed if all rows are such.
    """
    nearest = distances[:, 0]
    telling = nearest[nearest.isfinite() & (nearest > 1e-5 * squared_norm)]
    median = float(telling.median()) if len(telling) else 0.1 * squared_norm
    return [float(f"{median * factor:.2g}") for factor in (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)]


def tune(search: KnnSearch, pairs: Sequence[Pair], grid: Grid, decoding: Decoding) -> Tuning:
    """Choose settings on a validation split.

    The likelihood of the references under every setting follows from one pass; the smallest sufficient nprobe is
    taken, then the best setting of each λ, and of those the best `finalists` are decoded and compared by BLEU.

    Args:
        search: Model and datastore.
        pairs: The validation split; never the test split.
        grid: The settings to choose from.
        decoding: How finalists are decoded.

    Returns:
        The chosen settings and what they were compared with.

    Raises:
        ValueError: There are no pairs.
    """
    if not pairs:
        raise ValueError("the validation split is empty, expected one pair or more to tune on")
    states = reference_states(search.backbone, pairs, grid.max_tokens)
    candidates = likelihoods(search, states, grid)
    best = max(candidate.log_likelihood for candidate in candidates)
    nprobe = min(
        candidate.settings.nprobe
        for candidate in candidates
        if candidate.log_likelihood >= best - grid.nprobe_tolerance
    )
    of_each_share = [
        max(
            (c for c in candidates if c.settings.nprobe == nprobe and c.settings.lambda_ == lambda_),
            key=lambda candidate: candidate.log_likelihood,
        )
        for lambda_ in grid.lambda_
    ]
    of_each_share.sort(key=lambda candidate: -candidate.log_likelihood)
    plain = float(states.log_probs.double().mean())
    plain_bleu = _bleu(Translator(search.backbone, decoding), pairs)
    log.info("plain model: log-likelihood %.3f, BLEU %.2f", plain, plain_bleu)
    finalists = []
    for candidate in of_each_share[: grid.finalists]:
        bleu = _bleu(search.translator(candidate.settings, decoding), pairs)
        log.info("%s: log-likelihood %.3f, BLEU %.2f", candidate.settings, candidate.log_likelihood, bleu)
        finalists.append(Candidate(candidate.settings, candidate.log_likelihood, bleu))
    finalists.sort(key=lambda candidate: -(candidate.bleu or 0.0))
    if best <= plain:
        log.warning("no setting predicts the references better (%.3f) than the plain model (%.3f)", best, plain)
    if (finalists[0].bleu or 0.0) <= plain_bleu:
        log.warning(
            "no setting translates better (BLEU %.2f) than the plain model (%.2f)", finalists[0].bleu, plain_bleu
        )
    return Tuning(
        best=finalists[0].settings,
        plain_log_likelihood=plain,
        plain_bleu=plain_bleu,
        finalists=tuple(finalists),
        tried=len(candidates),
        tokens=len(states.tokens),
    )


def _bleu(translator: Translator, pairs: Sequence[Pair]) -> float:
    texts = translator.translate([pair.src for pair in pairs]).texts
    return corpus_scores(texts, [pair.tgt for pair in pairs]).bleu.value
