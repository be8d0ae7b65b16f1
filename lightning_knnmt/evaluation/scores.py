"""BLEU and chrF with their sacreBLEU signatures, and the paired bootstrap between two systems."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.metrics.base import Metric
from sacrebleu.significance import _compute_p_value


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
    for name, side in sides.items():
        if isinstance(side, str):
            raise TypeError(f"{name} is one string, expected a list of sentences: pass [{name}] to score one sentence")
    lengths = {name: len(side) for name, side in sides.items()}
    given = ", ".join(f"{length} {name}" for name, length in lengths.items())
    if len(set(lengths.values())) > 1:
        raise ValueError(
            f"Given {given}; expected the same number of each. Check that each list holds one sentence a segment, "
            "in the same order, with blank lines kept."
        )
    if 0 in lengths.values():
        raise ValueError(f"Given {given}; expected at least one sentence. Check that the test set is not empty.")


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

    Resamples and p-values are those of ``sacrebleu.significance.PairedTest(test_type="bs")`` under the same seed, with
    one exception: where no resample tells the systems apart the p-value is 1, while sacreBLEU gives 1 / (samples + 1).
    The interval runs over the same resamples' differences, cut where sacreBLEU's ``estimate_ci`` cuts.

    Args:
        baseline: Detokenized translations of the baseline.
        system: Detokenized translations of the system, of the same segments.
        references: Detokenized references, one a segment.
        samples: Number of bootstrap resamples.
        seed: Seed of the resamples.

    Returns:
        Scores, difference, p-value and interval by metric.

    Raises:
        ValueError: The lists are empty, or differ in length; or ``samples`` is not positive.
    """
    check_aligned(baseline=baseline, system=system, references=references)
    if samples < 1:
        raise ValueError(f"samples is {samples}, expected at least 1: use 1000 as sacreBLEU does")
    counts = _resample_counts(len(references), samples, seed)
    bleu, chrf = (_paired_score(metric, baseline, system, references, counts, seed) for metric in (BLEU(), CHRF()))
    return PairedBootstrap(bleu, chrf, samples, seed)


def _corpus_score(metric: Metric, hypotheses: Sequence[str], references: Sequence[str]) -> Score:
    result = metric.corpus_score(list(hypotheses), [list(references)])
    return Score(result.name, float(result.score), metric.get_signature().format())


def _resample_counts(sentences: int, samples: int, seed: int) -> np.ndarray:
    """Count how often each resample draws each sentence: [samples, sentences].

    Sums of statistics are then one matrix product, in place of sacreBLEU's [samples, sentences, statistics] array.
    """
    drawn = np.random.default_rng(seed).choice(sentences, size=(samples, sentences), replace=True)
    return np.stack([np.bincount(row, minlength=sentences) for row in drawn])


def _paired_score(
    metric: Metric,
    baseline: Sequence[str],
    system: Sequence[str],
    references: Sequence[str],
    counts: np.ndarray,
    seed: int,
) -> PairedScore:
    stats = [np.array(metric._extract_corpus_statistics(side, [references]), float) for side in (baseline, system)]
    scores = [metric._compute_score_from_stats(side.sum(0)) for side in stats]
    resampled = [[metric._compute_score_from_stats(row).score for row in counts @ side] for side in stats]
    delta = scores[1].score - scores[0].score
    deltas = np.subtract(resampled[1], resampled[0])
    # sacreBLEU counts the differences above the observed one: none, where all are zero
    centred = np.abs(deltas) - np.abs(deltas).mean()
    p_value = _compute_p_value(centred, abs(delta)) if deltas.any() else 1.0
    ordered, cut = np.sort(deltas), len(deltas) // 40
    signature = metric.get_signature()
    signature.update("seed", seed)
    signature.update("bs", len(deltas))
    return PairedScore(
        name=scores[0].name,
        baseline=float(scores[0].score),
        system=float(scores[1].score),
        delta=float(delta),
        p_value=float(p_value),
        low=float(ordered[cut]),
        high=float(ordered[-cut - 1]),
        signature=signature.format(),
    )
