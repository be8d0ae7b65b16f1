"""BLEU and chrF with their sacreBLEU signatures, and the paired bootstrap between two systems."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import PairedTest

from lightning_knnmt.checks import check_at_least, check_texts


@dataclass(frozen=True)
class Score:
    """One corpus score and what is needed to compute it again.

    Attributes:
        name: Name of the metric, such as ``BLEU``.
        value: The score, in the metric's own scale (BLEU and chrF: 0 to 100).
        signature: The metric's settings and version, as the metric's own tool writes them.
    """

    name: str
    value: float
    signature: str


@dataclass(frozen=True)
class CorpusScores:
    """The surface scores of one system.

    Attributes:
        bleu: Corpus BLEU.
        chrf: Corpus chrF2.
    """

    bleu: Score
    chrf: Score


@dataclass(frozen=True)
class PairedScore:
    """One metric on two systems, with the bootstrap of their difference.

    Attributes:
        name: Name of the metric.
        baseline: Corpus score of the baseline.
        system: Corpus score of the system.
        delta: ``system - baseline``.
        p_value: Two-sided p-value of the paired bootstrap test.
        low: Lower end of the 95% interval of ``delta``.
        high: Upper end of the 95% interval of ``delta``.
        signature: sacreBLEU's signature, with the number of samples (``bs``) and the seed.
    """

    name: str
    baseline: float
    system: float
    delta: float
    p_value: float
    low: float
    high: float
    signature: str


@dataclass(frozen=True)
class PairedBootstrap:
    """Two systems compared on the same resamples of one test set.

    Attributes:
        bleu: Comparison by corpus BLEU.
        chrf: Comparison by corpus chrF2.
        samples: Number of bootstrap resamples.
        seed: Seed of the resamples.
    """

    bleu: PairedScore
    chrf: PairedScore
    samples: int
    seed: int


def check_aligned(**sides: Sequence[str]) -> None:
    """Check that lists of sentences can be scored against each other.

    Args:
        sides: The lists by name, each of one sentence a segment.

    Raises:
        TypeError: A side is one string, not a list of strings.
        ValueError: The lists are empty, or differ in length.
    """
    check_texts(**sides)
    lengths = {name: len(side) for name, side in sides.items()}
    given = ", ".join(f"{length} {name}" for name, length in lengths.items())
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"there are {given}, expected the same number of each: one sentence a segment, in the same order, with "
            "blank lines kept"
        )
    if 0 in lengths.values():
        raise ValueError(f"there are {given}, expected one sentence or more; is the test set empty?")


def corpus_scores(hypotheses: Sequence[str], references: Sequence[str]) -> CorpusScores:
    """Score detokenized translations by sacreBLEU's corpus BLEU and chrF2, in their default settings.

    Args:
        hypotheses: Detokenized translations.
        references: Detokenized references, one a translation.

    Returns:
        Both scores with their signatures.

    Raises:
        ValueError: The lists are empty, or differ in length.

    Example:
        >>> round(corpus_scores(["It dissolves in water."], ["It dissolves in water."]).bleu.value, 2)
        100.0
    """
    check_aligned(hypotheses=hypotheses, references=references)
    bleu, chrf = (_corpus_score(metric, hypotheses, references) for metric in (BLEU(), CHRF()))
    return CorpusScores(bleu, chrf)


def paired_bootstrap(
    baseline: Sequence[str],
    system: Sequence[str],
    references: Sequence[str],
    samples: int = 1000,
    seed: int = 12345,
) -> PairedBootstrap:
    """Compare two systems by paired bootstrap resampling (Koehn, EMNLP 2004).

    Scores, resamples and p-values are those of ``sacrebleu.significance.PairedTest(test_type="bs")`` under the same
    seed, with one exception: where no resample tells the systems apart the p-value is 1, while sacreBLEU gives
    1 / (samples + 1). The interval runs over the same resamples' differences, cut where sacreBLEU's ``estimate_ci``
    cuts.

    Args:
        baseline: Detokenized translations of the baseline.
        system: Detokenized translations of the system, of the same segments.
        references: Detokenized references, one a segment.
        samples: Number of bootstrap resamples.
        seed: Seed of the resamples, 1 or more (sacreBLEU takes 0 for no seed).

    Returns:
        Scores, difference, p-value and interval by metric.

    Raises:
        ValueError: The lists are empty, or differ in length; or ``samples`` or ``seed`` is not positive.
    """
    check_aligned(baseline=baseline, system=system, references=references)
    check_at_least(1, samples=samples, seed=seed)
    metrics = {"BLEU": _RecordedBLEU(), "chrF2": _RecordedCHRF()}
    systems: list[tuple[str, Sequence[str]]] = [("baseline", list(baseline)), ("system", list(system))]
    with _seeded(seed):
        test = PairedTest(systems, metrics, [list(references)], test_type="bs", n_samples=samples)
        signatures, results = test()
    bleu, chrf = (
        _paired_score(name, results[name], metric.recorded, samples, signatures[name].format())
        for name, metric in metrics.items()
    )
    return PairedBootstrap(bleu, chrf, samples, seed)


class _Recorded(Metric):
    """A metric that remembers all corpus scores that it was asked for.

    sacreBLEU's public interface gives the scores of neither the resamples of a test nor of summed statistics, so that
    the interval of a difference cannot be had without scoring every resample's text anew. This overrides the method by
    which every subclass of `Metric` makes a score, the only place here that is not public.
    """

    def __init__(self) -> None:
        super().__init__()
        self.recorded: list[float] = []

    def _compute_score_from_stats(self, stats: Any) -> Any:
        # sacreBLEU sums in float32, which is exact, but would divide in it, too
        score = super()._compute_score_from_stats([float(value) for value in stats])  # type: ignore[safe-super]
        self.recorded.append(score.score)
        return score


class _RecordedBLEU(_Recorded, BLEU):
    pass


class _RecordedCHRF(_Recorded, CHRF):
    pass


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """sacreBLEU's tests take their seed from the environment only."""
    name = "SACREBLEU_SEED"
    before = os.environ.get(name)
    os.environ[name] = str(seed)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _corpus_score(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    result = metric.corpus_score(list(hypotheses), [list(references)])
    return Score(result.name, float(result.score), metric.get_signature().format())


def _paired_score(name: str, results: Any, recorded: Sequence[float], samples: int, signature: str) -> PairedScore:
    baseline, system = (float(result.score) for result in results)
    # a paired test ends with the resamples of the baseline and, after them, those of the system
    deltas = np.sort(np.subtract(recorded[-samples:], recorded[-2 * samples : -samples]))
    cut = samples // 40
    return PairedScore(
        name=name,
        baseline=baseline,
        system=system,
        delta=system - baseline,
        p_value=float(results[1].p_value) if deltas.any() else 1.0,
        low=float(deltas[cut]),
        high=float(deltas[-cut - 1]),
        signature=signature,
    )
