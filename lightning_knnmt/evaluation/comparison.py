"""The plain model and kNN-MT on the same sentences, in one run."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Translations, Translator
from lightning_knnmt.evaluation.scores import CorpusScores, Score, corpus_scores


@dataclass(frozen=True)
class Speed:
    """How fast a system decodes.

    Attributes:
        tokens_per_second: Target tokens per second, median of the repeats.
        repeats: Tokens per second of each repeat, after one warm-up that is not counted.
        search_share: Share of the time spent in the search for neighbors, median.
        batch_size: Sentences decoded at a time.
    """

    tokens_per_second: float
    repeats: tuple[float, ...]
    search_share: float
    batch_size: int


@dataclass(frozen=True)
class SystemResult:
    """What one system achieves on a test split.

    Attributes:
        texts: Its translations.
        scores: BLEU and chrF.
        speed: Tokens per second.
        comet: COMET, where a model was given.
    """

    texts: list[str]
    scores: CorpusScores
    speed: Speed
    comet: Score | None = None


def run_systems(
    translators: Mapping[str, Translator], pairs: Sequence[Pair], repeats: int = 3
) -> dict[str, SystemResult]:
    """Translate a test split with every system in turn, several times, and score the translations.

    Repeats are interleaved, so that a busy moment of the machine strikes all systems alike.

    Args:
        translators: Systems by name.
        pairs: The test split.
        repeats: Timed repeats, after one warm-up over the whole split.

    Returns:
        Results by name.
    """
    if repeats < 1:
        raise ValueError(f"repeats is {repeats}, expected 1 or more")
    sources = [pair.src for pair in pairs]
    rounds: dict[str, list[Translations]] = {name: [] for name in translators}
    for _ in range(repeats + 1):
        for name, translator in translators.items():
            rounds[name].append(translator.translate(sources))
    results = {}
    for name, translator in translators.items():
        timed = rounds[name][1:]
        rates = tuple(run.tokens / run.seconds for run in timed)
        speed = Speed(
            tokens_per_second=statistics.median(rates),
            repeats=rates,
            search_share=statistics.median(run.spans.seconds["search"] / run.seconds for run in timed),
            batch_size=translator.decoding.batch_size,
        )
        texts = timed[0].texts
        results[name] = SystemResult(texts, corpus_scores(texts, [pair.tgt for pair in pairs]), speed)
    return results
