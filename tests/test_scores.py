import os

import numpy as np
import pytest
from sacrebleu.metrics import BLEU, CHRF
from sacrebleu.significance import PairedTest

from lightning_knnmt.evaluation.scores import corpus_scores, paired_bootstrap

DRUGS = ["Metformin", "Ibuprofen", "Warfarin", "Insulin glargine", "Amoxicillin"]
EVENTS = ["severe headache", "nausea or vomiting", "a skin rash", "unusual bleeding", "low blood sugar", "dizziness"]


def _corpus() -> tuple[list[str], list[str], list[str]]:
    """References, a system that is close to them, and a baseline that is further off."""
    references = [
        f"Tell your doctor immediately if {event} occurs while you are taking {drug}, {dose} mg once daily."
        for dose, drug in enumerate(DRUGS, 5)
        for event in EVENTS
    ]
    rng = np.random.default_rng(3)
    system, baseline = [], []
    for reference in references:
        near = reference.replace("immediately", "at once") if rng.random() < 0.5 else reference
        far = reference.replace("Tell your doctor", "Say to the medic").replace("once daily", "one time each day")
        system.append(near.replace("occurs", "appears") if rng.random() < 0.5 else near)
        baseline.append(far if rng.random() < 0.8 else near)
    return references, system, baseline


def _paired_test(
    monkeypatch: pytest.MonkeyPatch, baseline: list[str], system: list[str], references: list[str], seed: int
) -> tuple[dict, dict]:
    monkeypatch.setenv("SACREBLEU_SEED", str(seed))
    metrics = {"BLEU": BLEU(), "chrF2": CHRF()}
    test = PairedTest([("baseline", baseline), ("system", system)], metrics, [references], "bs", n_samples=200)
    return test()


def test_scores_and_signatures_are_those_of_sacrebleu():
    references, system, _ = _corpus()
    scores = corpus_scores(system, references)
    for score, metric in ((scores.bleu, BLEU()), (scores.chrf, CHRF())):
        expected = metric.corpus_score(system, [references])
        assert score.name == expected.name
        assert score.value == expected.score
        assert score.signature == metric.get_signature().format()
    assert 50 < scores.bleu.value < 100
    assert "tok:13a" in scores.bleu.signature and "version:" in scores.bleu.signature
    assert "nc:6" in scores.chrf.signature


def test_perfect_translation_scores_a_hundred():
    references, _, _ = _corpus()
    scores = corpus_scores(references, references)
    assert scores.bleu.value == pytest.approx(100)
    assert scores.chrf.value == pytest.approx(100)


def test_lengths_that_differ_are_named():
    references, system, baseline = _corpus()
    with pytest.raises(
        ValueError, match=r"there are 29 hypotheses, 30 references, expected the same number.*blank lines"
    ):
        corpus_scores(system[:-1], references)
    with pytest.raises(ValueError, match="there are 30 baseline, 28 system, 30 references, expected the same number"):
        paired_bootstrap(baseline, system[2:], references)


def test_empty_lists_are_named():
    with pytest.raises(ValueError, match="there are 0 hypotheses, 0 references, expected one sentence or more"):
        corpus_scores([], [])


def test_one_string_is_not_a_list_of_sentences():
    with pytest.raises(TypeError, match=r"hypotheses is one string, 'Take one tablet\.', expected a list of strings"):
        corpus_scores("Take one tablet.", ["Take one tablet."])


@pytest.mark.parametrize("seed", [7, 12345])
def test_bootstrap_gives_the_p_values_of_sacrebleu(monkeypatch: pytest.MonkeyPatch, seed: int):
    references, system, baseline = _corpus()
    close = [near if row % 5 else far for row, (near, far) in enumerate(zip(system, baseline, strict=True))]
    for other in (baseline, close):
        signatures, results = _paired_test(monkeypatch, other, system, references, seed)
        compared = paired_bootstrap(other, system, references, samples=200, seed=seed)
        for score in (compared.bleu, compared.chrf):
            expected = results[score.name][1]
            assert score.p_value == pytest.approx(expected.p_value)
            assert score.baseline == pytest.approx(results[score.name][0].score)
            assert score.system == pytest.approx(expected.score)
            assert score.signature == signatures[score.name].format()


def test_interval_of_the_difference_is_that_of_rescored_resamples():
    references, system, baseline = _corpus()
    compared = paired_bootstrap(baseline, system, references, samples=80, seed=5).bleu
    drawn = np.random.default_rng(5).choice(len(references), size=(80, len(references)), replace=True)
    deltas = []
    for rows in drawn:
        resampled = [[references[row] for row in rows]]
        system_score = BLEU().corpus_score([system[row] for row in rows], resampled).score
        deltas.append(system_score - BLEU().corpus_score([baseline[row] for row in rows], resampled).score)
    deltas.sort()
    assert (compared.low, compared.high) == pytest.approx((deltas[2], deltas[-3]))
    assert compared.low < compared.delta < compared.high


def test_identical_systems_do_not_differ():
    references, system, _ = _corpus()
    compared = paired_bootstrap(system, system, references, samples=100)
    for score in (compared.bleu, compared.chrf):
        assert (score.delta, score.low, score.high) == (0, 0, 0)
        assert score.p_value == 1


def test_a_clearly_better_system_is_significant_in_both_directions():
    references, system, baseline = _corpus()
    better = paired_bootstrap(baseline, system, references, samples=300)
    worse = paired_bootstrap(system, baseline, references, samples=300)
    for up, down in ((better.bleu, worse.bleu), (better.chrf, worse.chrf)):
        assert up.delta > 0 and up.low > 0 and up.p_value < 0.01
        assert down.delta == -up.delta and down.p_value == up.p_value
        assert (down.low, down.high) == pytest.approx((-up.high, -up.low))


def test_bootstrap_follows_its_seed_and_not_the_environment(monkeypatch: pytest.MonkeyPatch):
    references, system, baseline = _corpus()
    first = paired_bootstrap(baseline, system, references, samples=100, seed=1)
    monkeypatch.setenv("SACREBLEU_SEED", "99")
    assert paired_bootstrap(baseline, system, references, samples=100, seed=1) == first
    other = paired_bootstrap(baseline, system, references, samples=100, seed=2)
    assert (other.bleu.low, other.bleu.high) != (first.bleu.low, first.bleu.high)
    assert other.bleu.delta == first.bleu.delta


def test_bootstrap_leaves_the_environment_as_it_was(monkeypatch: pytest.MonkeyPatch):
    for before in (None, "17"):
        monkeypatch.delenv("SACREBLEU_SEED", raising=False)
        if before is not None:
            monkeypatch.setenv("SACREBLEU_SEED", before)
        paired_bootstrap(["Take one."], ["Take two."], ["Take one."], samples=5)
        assert os.environ.get("SACREBLEU_SEED") == before


def test_interval_of_the_difference_in_chrf_is_that_of_rescored_resamples():
    references, system, baseline = _corpus()
    compared = paired_bootstrap(baseline, system, references, samples=80, seed=5).chrf
    drawn = np.random.default_rng(5).choice(len(references), size=(80, len(references)), replace=True)
    deltas = []
    for rows in drawn:
        resampled = [[references[row] for row in rows]]
        scores = [CHRF().corpus_score([side[row] for row in rows], resampled).score for side in (baseline, system)]
        deltas.append(scores[1] - scores[0])
    deltas.sort()
    assert (compared.low, compared.high) == pytest.approx((deltas[2], deltas[-3]))


def test_seed_0_which_is_none_to_sacrebleu_is_refused():
    with pytest.raises(ValueError, match="seed is 0, expected 1 or more"):
        paired_bootstrap(["Take one."], ["Take one."], ["Take one."], seed=0)


def test_bootstrap_needs_a_sample():
    with pytest.raises(ValueError, match="samples is 0, expected 1 or more"):
        paired_bootstrap(["Take one."], ["Take one."], ["Take one."], samples=0)
