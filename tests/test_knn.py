"""The kNN distribution and its mixture, against double loops and dense arithmetic in numpy."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.probability import knn_log_weights, knn_probs, mix_logits, neighbor_log_probs
from lightning_knnmt.knn.step import Step, log_sum_exp

ROWS, NEIGHBORS, VOCABULARY = 9, 12, 37


def make_neighbors(seed: int = 0, rows: int = ROWS, k: int = NEIGHBORS) -> Neighbors:
    """Duplicated tokens, token 0 as a true value beside missing neighbors, and rows without any neighbor."""
    rng = np.random.default_rng(seed)
    distances = np.sort(rng.gamma(2.0, 20.0, (rows, k)), axis=1).astype(np.float32)
    values = rng.choice([0, 3, 5, 5, 11, 30, VOCABULARY - 1], (rows, k))
    missing = np.arange(k) >= rng.integers(1, k + 1, (rows, 1))
    missing[1] = missing[4] = True
    values[2, 0], missing[2] = 0, np.arange(k) >= 3
    distances[missing], values[missing] = np.inf, 0
    ids = np.where(missing, -1, rng.integers(0, 1000, (rows, k)))
    return Neighbors(torch.from_numpy(distances), torch.from_numpy(values), torch.from_numpy(ids))


def step_of(logits: Tensor) -> Step:
    return Step(torch.zeros(len(logits), 2), logits, torch.arange(len(logits)))


def knn_by_hand(neighbors: Neighbors, temperature: float) -> np.ndarray:
    probs = np.zeros((len(neighbors.ids), VOCABULARY))
    for row in range(len(probs)):
        for distance, value, entry in zip(
            neighbors.distances[row].tolist(), neighbors.values[row].tolist(), neighbors.ids[row].tolist(), strict=True
        ):
            if entry >= 0:
                probs[row, value] += math.exp(-distance / temperature)
        if probs[row].sum() > 0:
            probs[row] /= probs[row].sum()
    return probs


def softmax(logits: np.ndarray) -> np.ndarray:
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    return shifted / shifted.sum(1, keepdims=True)


def mixture_by_hand(logits: Tensor, neighbors: Neighbors, temperature: float, lambda_: float) -> np.ndarray:
    knn, model = knn_by_hand(neighbors, temperature), softmax(logits.double().numpy())
    found = knn.sum(1, keepdims=True) > 0
    return np.where(found, lambda_ * knn + (1 - lambda_) * model, model)


@pytest.mark.parametrize("temperature", [1.0, 10.0, 300.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_knn_probs_are_those_of_a_double_loop(seed: int, temperature: float) -> None:
    neighbors = make_neighbors(seed)
    shares = knn_log_weights(neighbors.distances, temperature)
    probs = knn_probs(shares, neighbors.values, VOCABULARY)
    np.testing.assert_allclose(probs.numpy(), knn_by_hand(neighbors, temperature), rtol=2e-5, atol=1e-7)
    found = (neighbors.ids >= 0).any(1)
    torch.testing.assert_close(probs.sum(1), found.float())


@pytest.mark.parametrize("k", [1, 2, NEIGHBORS])
def test_log_prob_of_each_neighbor_is_that_of_its_token(k: int) -> None:
    neighbors = make_neighbors(3, k=max(k, 3)).first(k)
    log_probs = neighbor_log_probs(knn_log_weights(neighbors.distances, 10.0), neighbors.values)
    dense = knn_by_hand(neighbors, 10.0)
    expected = np.take_along_axis(dense, neighbors.values.numpy(), 1)
    np.testing.assert_allclose(log_probs.exp().numpy(), expected, rtol=2e-5, atol=1e-7)


def test_weights_of_far_neighbors_stay_finite() -> None:
    distances = torch.tensor([[3e5, 3.0001e5, 4e5], [2e38, 3e38, math.inf]])
    weights = knn_log_weights(distances, 10.0).exp()
    expected = 1 / (1 + math.exp(-1))
    torch.testing.assert_close(weights[0], torch.tensor([expected, 1 - expected, 0.0]), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(weights[1], torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("lambda_", [0.0, 1e-6, 0.1, 0.5, 0.8, 0.999, 1 - 1e-7, 1.0])
def test_softmax_of_mixed_logits_is_the_mixture(lambda_: float, in_place: bool) -> None:
    neighbors = make_neighbors(5)
    logits = 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(5))
    given = logits.clone()
    log_probs = neighbor_log_probs(knn_log_weights(neighbors.distances, 10.0), neighbors.values)
    mixed = mix_logits(given, neighbors.values, log_probs, lambda_, log_sum_exp(logits), in_place)
    expected = mixture_by_hand(logits, neighbors, 10.0, lambda_)
    np.testing.assert_allclose(mixed.double().softmax(1).numpy(), expected, rtol=1e-4, atol=1e-7)
    if not in_place:
        assert given.equal(logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lambda_", [0.2, 0.7, 1.0])
def test_mixture_of_half_precision_logits_is_as_exact_as_that_of_float32(dtype: torch.dtype, lambda_: float) -> None:
    neighbors = make_neighbors(6)
    logits = (4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(6))).to(dtype)
    mixed = FixedCombiner(lambda_, 10.0)(step_of(logits), neighbors)
    assert mixed.dtype == torch.float32
    expected = mixture_by_hand(logits.float(), neighbors, 10.0, lambda_)
    np.testing.assert_allclose(mixed.double().softmax(1).numpy(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("lambda_", [0.3, 0.9, 1.0])
def test_tokens_that_the_model_excludes_get_the_neighbors_share_only(lambda_: float) -> None:
    neighbors = make_neighbors(7)
    logits = 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(7))
    logits[:, [0, 5, 20]] = -math.inf  # 0 and 5 are retrieved in some rows, 20 is in none
    mixed = FixedCombiner(lambda_, 10.0)(step_of(logits), neighbors)
    assert not mixed.isnan().any()
    expected = mixture_by_hand(logits, neighbors, 10.0, lambda_)
    np.testing.assert_allclose(mixed.double().softmax(1).numpy(), expected, rtol=1e-4, atol=1e-7)
    assert (mixed[:, 20] == -math.inf).all()


@pytest.mark.parametrize("lambda_", [0.5, 1.0])
def test_rows_without_neighbors_and_tokens_without_neighbors_keep_their_logits(lambda_: float) -> None:
    neighbors = make_neighbors(8)
    logits = torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(8))
    mixed = FixedCombiner(lambda_, 10.0)(step_of(logits), neighbors)
    nothing = (neighbors.ids < 0).all(1)
    assert nothing.sum() == 2
    assert mixed[nothing].equal(logits[nothing])
    if lambda_ < 1:
        retrieved = torch.from_numpy(knn_by_hand(neighbors, 10.0) > 0)
        assert mixed[~retrieved].equal(logits[~retrieved])
        assert (mixed[retrieved] > logits[retrieved]).all()


def test_mixing_a_large_vocabulary_in_blocks_is_mixing_row_by_row() -> None:
    generator = torch.Generator().manual_seed(9)
    logits = 3 * torch.randn(21, 70_001, generator=generator)  # 7 rows are a block
    values = torch.randint(0, 70_001, (21, 6), generator=generator)
    log_probs = neighbor_log_probs(knn_log_weights(50 * torch.rand(21, 6, generator=generator), 10.0), values)
    whole = mix_logits(logits, values, log_probs, 0.4, log_sum_exp(logits))
    rows = [
        mix_logits(
            logits[r : r + 1], values[r : r + 1], log_probs[r : r + 1], 0.4, logits[r : r + 1].logsumexp(1, True)
        )
        for r in range(21)
    ]
    torch.testing.assert_close(whole, torch.cat(rows))
    assert mix_logits(logits[:0], values[:0], log_probs[:0], 0.4, log_sum_exp(logits[:0])).shape == (0, 70_001)


def test_first_k_neighbors_are_the_nearest() -> None:
    neighbors = make_neighbors(10)
    assert neighbors.first(4).distances.equal(neighbors.distances[:, :4])
    assert neighbors.first(4).values.equal(neighbors.values[:, :4])
    assert neighbors.first(4).ids.equal(neighbors.ids[:, :4])


@pytest.mark.parametrize("lambda_", [-0.1, 1.5, math.nan])
def test_lambda_outside_of_0_to_1_is_refused(lambda_: float) -> None:
    with pytest.raises(ValueError, match=rf"lambda_ is {lambda_}, expected 0 to 1"):
        FixedCombiner(lambda_=lambda_)


@pytest.mark.parametrize("temperature", [0.0, -2.0, math.nan, math.inf])
def test_temperature_of_0_or_less_or_without_end_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match=rf"temperature is {temperature}, expected more than 0"):
        FixedCombiner(temperature=temperature)
