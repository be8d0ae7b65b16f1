"""Perplexity of a language model with and without neighbors (kNN-LM, arXiv 1911.00172)."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.evaluation.report import table
from lightning_knnmt.evaluation.tuning import Candidate, Grid, likelihoods, shortlist, warn_of_edges
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.reference import reference_steps
from lightning_knnmt.knn.settings import MixtureConfig
from lightning_knnmt.knn.step import Step
from lightning_knnmt.timing import Spans

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Perplexity:
    """How well a model, alone or in a mixture, predicts some texts.

    Attributes:
        log_likelihood: Mean natural log-probability of a token.
        tokens: Tokens that were predicted; those of contexts are not counted.
        tokens_per_second: Of these tokens, teacher-forced; the time of contexts is counted.
        search_share: Share of that time spent in the search for neighbors.
        searches: Searches per token: less than 1 where a gate is closed, or a retriever follows pointers.
    """

    log_likelihood: float
    tokens: int
    tokens_per_second: float
    search_share: float = 0.0
    searches: float = 0.0

    @property
    def perplexity(self) -> float:
        """exp(−log-likelihood), per token of the model's own vocabulary.

        >>> round(Perplexity(-math.log(8), tokens=100, tokens_per_second=50).perplexity, 6)
        8.0
        """
        return math.exp(-self.log_likelihood)

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return {"perplexity": self.perplexity, **asdict(self)}


@dataclass(frozen=True)
class LikelihoodTuning:
    """What tuning by likelihood has led to.

    Attributes:
        best: The choice that predicts the documents best, with the smallest sufficient nprobe.
        plain_log_likelihood: That of the plain model, per token.
        tried: How many choices were compared.
        tokens: Tokens that the likelihoods are means of.
    """

    best: Candidate
    plain_log_likelihood: float
    tried: int
    tokens: int

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        best = {"settings": self.best.mixture.plain, "log_likelihood": self.best.log_likelihood}
        return {**vars(self), "best": best}


def tune_likelihood(
    model: KeyedModel, memory: Memory, mixture: MixtureConfig, pairs: Sequence[Pair], grid: Grid
) -> LikelihoodTuning:
    """Choose the options of a mixture that predict held-out documents best.

    Args:
        model: The model.
        memory: Its memory.
        mixture: Retriever, combiner and gate, whose other options stay as they are.
        pairs: Windows of documents that are neither stored nor tested.
        grid: The values to choose from.

    Raises:
        ValueError: There are no windows.
    """
    if not pairs:
        raise ValueError("the validation split is empty, expected one window or more to tune on")
    candidates, plain, tokens = likelihoods(model, memory, mixture, pairs, grid)
    sufficient = max(candidate.log_likelihood for candidate in candidates) - grid.nprobe_tolerance
    best = shortlist(candidates, sufficient)[0]
    log.info("plain model: log-likelihood %.3f; %s: %.3f", plain, best.mixture, best.log_likelihood)
    warn_of_edges(best.options, grid.values_for(mixture, memory.nlist))
    if best.log_likelihood <= plain:
        log.warning(
            "no setting predicts the documents better (%.3f) than the plain model (%.3f)", best.log_likelihood, plain
        )
    return LikelihoodTuning(best, plain, len(candidates), tokens)


@torch.inference_mode()
def perplexities(
    model: KeyedModel, mixtures: Mapping[str, Mixture | PlainModel], pairs: Sequence[Pair], max_tokens: int = 1024
) -> dict[str, Perplexity]:
    """Predict the same texts with several mixtures of one model, in one teacher-forced pass.

    Args:
        model: The model.
        mixtures: By name.
        pairs: Windows of documents that are not stored.
        max_tokens: Most tokens of a batch, of contexts or of what continues them.

    Raises:
        ValueError: There are no windows.
    """
    if not pairs:
        raise ValueError("the test split is empty, expected one window or more")
    sums = dict.fromkeys(mixtures, 0.0)
    spans = {name: Spans() for name in mixtures}
    forward = Spans()
    steps = reference_steps(model, pairs, max_tokens)
    tokens = 0
    while True:
        with forward.span("model"):
            if (reference := next(steps, None)) is None:
                break
            step = reference.step
            step.log_normalizer  # noqa: B018 (computed once, as part of the model's own prediction)
        tokens += len(step)
        for name, mixture in mixtures.items():
            with spans[name].span("mixture", len(step)):
                mixture.begin(reference.batch)
                log_probs = token_log_probs(mixture, step, reference.tokens, spans[name])
                sums[name] += float(log_probs.double().sum())
    found = {}
    for name, own in spans.items():
        seconds = forward.seconds["model"] + own.seconds["mixture"]
        found[name] = Perplexity(
            sums[name] / tokens,
            tokens,
            tokens / seconds,
            own.seconds["search"] / seconds,
            own.counts["search"] / tokens,
        )
    return found


def token_log_probs(mixture: Mixture | PlainModel, step: Step, tokens: Tensor, spans: Spans | None = None) -> Tensor:
    """Log-probability of one token of each row, shape (R,), float32."""
    if isinstance(mixture, Mixture) and not mixture.changes_nothing:
        return mixture.combiner.token_log_probs(step, mixture.neighbors(step, spans), tokens)
    return (step.logits.gather(1, tokens[:, None]).float() - step.log_normalizer).squeeze(1)


def check_documents_apart(splits: Mapping[str, Iterable[Pair]]) -> None:
    """Make sure that no document is in two splits, or in one and in the datastore.

    Raises:
        ValueError: One is.
    """
    seen: dict[str, str] = {}
    for name, pairs in splits.items():
        for document in sorted({pair.document for pair in pairs} - {""}):
            if document in seen:
                raise ValueError(
                    f"{document!r} is a document of {seen[document]} and of {name}, expected each in one; "
                    "write the splits with prepare_data.py"
                )
            seen[document] = name


def perplexity_table(systems: Mapping[str, Perplexity], imbalance_factor: float | None) -> str:
    """A Markdown table of several systems; the imbalance factor is that of the index of all with neighbors."""
    rows = [["system", "perplexity", "log-likelihood", "tokens/s", "time in search", "searches per token", "imbalance"]]
    for name, system in systems.items():
        searches = system.search_share > 0
        rows.append(
            [
                name,
                f"{system.perplexity:.2f}",
                f"{system.log_likelihood:.3f}",
                f"{system.tokens_per_second:.0f}",
                f"{system.search_share:.1%}" if searches else "",
                f"{system.searches:.2f}" if searches else "",
                f"{imbalance_factor:.2f}" if searches and imbalance_factor is not None else "",
            ]
        )
    return table(rows)
