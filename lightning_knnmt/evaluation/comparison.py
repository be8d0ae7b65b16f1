"""The plain model and kNN-MT on the same sentences, in one run."""

import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Translations, Translator
from lightning_knnmt.evaluation.online import OnlineTranslator
from lightning_knnmt.evaluation.scores import CorpusScores, Score, corpus_scores

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Contender:
    """Another model with its own datastore, such as one whose keys were dispersed.

    Attributes:
        model: Hub name or folder; it reads the same languages as the first model.
        datastore: Folder of a datastore built from it.
        index: Name of that datastore's index.
    """

    model: str
    datastore: Path
    index: str = "index"


@dataclass(frozen=True)
class Speed:
    """How fast a system decodes.

    Attributes:
        tokens_per_second: Target tokens per second, median of the repeats.
        repeats: Tokens per second of each repeat, after one warm-up that is not counted.
        search_share: Share of the time spent in the search for neighbors, median.
        batch_size: Sentences decoded at a time.
        searches: Rows that searched, of all rows of all steps; a gate leaves some out.
    """

    tokens_per_second: float
    repeats: tuple[float, ...]
    search_share: float
    batch_size: int
    searches: float = 0.0


@dataclass(frozen=True)
class SystemResult:
    """What one system achieves on a test split.

    Attributes:
        texts: Its translations.
        scores: BLEU and chrF.
        speed: Tokens per second.
        repeatable: Whether every repeat gave the same translations.
        cut: Sources that were longer than the model's positions, and were cut.
        comet: COMET, where a model was given.
    """

    texts: list[str]
    scores: CorpusScores
    speed: Speed
    repeatable: bool
    cut: int = 0
    comet: Score | None = None


def run_systems(
    translators: Mapping[str, Translator | OnlineTranslator], pairs: Sequence[Pair], repeats: int = 3, seed: int = 1
) -> dict[str, SystemResult]:
    """Translate a test split with every system in turn, several times, and score the translations.

    Repeats are interleaved, so that a busy moment of the machine strikes all systems alike.

    Args:
        translators: Systems by name.
        pairs: The test split.
        repeats: Timed repeats, after one warm-up over the whole split.
        seed: Seed of every single run, in case decoding samples.

    Returns:
        Results by name.

    Raises:
        ValueError: There are no pairs or no repeats.
    """
    check_at_least(1, repeats=repeats)
    if not pairs:
        raise ValueError("the test split is empty, expected one pair or more")
    sources = [pair.src for pair in pairs]
    rounds: dict[str, list[Translations]] = {name: [] for name in translators}
    for number in range(repeats + 1):
        for name, translator in translators.items():
            torch.manual_seed(seed)
            done = translator.translate(sources)
            rounds[name].append(done)
            which = f"repeat {number} of {repeats}" if number else "warm-up"
            log.info("%s, %s: %.1f s, %.0f tokens/s", name, which, done.seconds, done.tokens / max(done.seconds, 1e-9))
    results = {}
    for name, translator in translators.items():
        timed = rounds[name][1:]
        rates = tuple(run.tokens / run.seconds for run in timed)
        speed = Speed(
            tokens_per_second=statistics.median(rates),
            repeats=rates,
            search_share=statistics.median(run.spans.seconds["search"] / run.seconds for run in timed),
            batch_size=1 if isinstance(translator, OnlineTranslator) else translator.batch_size,
            searches=timed[0].spans.share_of_rows("search"),
        )
        texts = timed[0].texts
        changed = sum(len(set(versions)) > 1 for versions in zip(*(run.texts for run in rounds[name]), strict=True))
        if changed:
            log.warning("%s: %d of %d translations differ between repeats of the same run", name, changed, len(texts))
        scores = corpus_scores(texts, [pair.tgt for pair in pairs])
        results[name] = SystemResult(texts, scores, speed, repeatable=not changed, cut=timed[0].cut)
    return results
