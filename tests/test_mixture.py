"""Mixtures of combiners with their own λ for each row, of gates and of retrievers, against arithmetic in numpy."""

from typing import Any

import numpy as np
import pytest
import torch
from own_parts import OwnCombiner
from test_knn import ROWS, VOCABULARY, knn_by_hand, make_neighbors, softmax, step_of
from torch import Tensor

from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.gates import ConfidenceGate, Gate, OpenGate
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.mixture import Mixture, PlainModel
from lightning_knnmt.knn.neighbors import Neighbors, no_neighbors
from lightning_knnmt.knn.probability import knn_log_weights, knn_probs
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.step import Step, sentences_of_rows

LAMBDAS = torch.tensor([0.0, 1.0, 1e-6, 0.3, 1.0, 0.999, 0.5, 0.0, 0.7])  # rows 1 and 4 have no neighbors
TEMPERATURE = 10.0


class PerRow(Combiner):
    """The λ of each row is given."""

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        return Weights(knn_log_weights(neighbors.distances, TEMPERATURE), LAMBDAS[: len(step), None])


def logits_of(seed: int) -> Tensor:
    return 4 * torch.randn(ROWS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def by_hand(logits: Tensor, neighbors: Neighbors, lambdas: np.ndarray) -> np.ndarray:
    knn, model = knn_by_hand(neighbors, TEMPERATURE), softmax(logits.double().numpy())
    found = knn.sum(1, keepdims=True) > 0
    return np.where(found, lambdas[:, None] * knn + (1 - lambdas[:, None]) * model, model)


@pytest.mark.parametrize("writable", [False, True])
@pytest.mark.parametrize("seed", [5, 6])
def test_each_row_is_mixed_by_its_own_lambda_0_and_1_among_them(seed: int, writable: bool) -> None:
    neighbors, logits = make_neighbors(seed), logits_of(seed)
    logits[3, [0, 5]] = -torch.inf
    expected = by_hand(logits, neighbors, LAMBDAS.double().numpy())
    step = Step(torch.zeros(ROWS, 2), logits.clone(), torch.arange(ROWS), writable)
    mixed = PerRow()(step, neighbors)
    assert not mixed.isnan().any()
    np.testing.assert_allclose(mixed.double().softmax(1).numpy(), expected, rtol=1e-4, atol=1e-7)
    assert mixed[[1, 4]].equal(logits[[1, 4]])
    assert (mixed.data_ptr() == step.logits.data_ptr()) == writable
    assert writable or step.logits.equal(logits)


@pytest.mark.parametrize(
    "combiner", [FixedCombiner(lam, TEMPERATURE) for lam in (0.0, 0.3, 1.0)] + [PerRow(), OwnCombiner()]
)
def test_log_probs_of_tokens_are_those_of_the_mixed_logits(combiner: Combiner) -> None:
    neighbors, logits = make_neighbors(7), logits_of(7)
    expected = combiner(step_of(logits), neighbors).double().log_softmax(1)
    for token in (0, 5, 11, 20, VOCABULARY - 1):  # a missing neighbor's value, duplicates, one that none has
        tokens = torch.full((ROWS,), token)
        found = combiner.token_log_probs(step_of(logits), neighbors, tokens)
        torch.testing.assert_close(found.double(), expected[:, token], rtol=1e-4, atol=1e-5)
    nothing = no_neighbors(ROWS, 3)
    plain = logits.log_softmax(1)[:, 5]
    torch.testing.assert_close(combiner.token_log_probs(step_of(logits), nothing, torch.full((ROWS,), 5)), plain)


def test_gradients_of_a_learned_combiner_are_those_of_differences() -> None:
    tokens = torch.full((ROWS,), 5)  # which some rows have among their neighbors, and some rows have no neighbors

    def log_likelihood(offset: float) -> Tensor:
        return OwnCombiner(offset).token_log_probs(step_of(logits_of(8)), make_neighbors(8), tokens).double().sum()

    combiner = OwnCombiner(2.0)
    combiner.token_log_probs(step_of(logits_of(8)), make_neighbors(8), tokens).sum().backward()
    assert combiner.offset.grad is not None
    slope = float(log_likelihood(2.05) - log_likelihood(1.95)) / 0.1
    assert combiner.offset.grad.item() == pytest.approx(slope, rel=1e-2) and abs(slope) > 0.1


@pytest.mark.parametrize("temperature", [1e-30, 1e-44, 1e-300])
def test_a_tiny_temperature_leaves_the_nearest_neighbor(temperature: float) -> None:
    distances = torch.tensor([[0.25, 0.5, 9.0], [3.0, 3.0, 4.0], [2.0, torch.inf, torch.inf]])
    shares = knn_log_weights(distances, temperature).exp()
    assert shares.tolist() == [[1, 0, 0], [0.5, 0.5, 0], [1, 0, 0]]
    values = torch.tensor([[3, 5, 5], [7, 7, 1], [4, 0, 0]])
    mixed = FixedCombiner(1.0, temperature)(step_of(torch.zeros(3, 10)), Neighbors(distances, values, values))
    assert mixed.argmax(1).tolist() == [3, 7, 4] and mixed.softmax(1).amax(1).tolist() == [1, 1, 1]


class Given(Retriever):
    """Row by row what is given, by the first number of each query."""

    def __init__(self, neighbors: Neighbors | None = None) -> None:
        self.neighbors, self.rows = neighbors, list[int]()

    def __call__(self, step: Step) -> Neighbors:
        assert self.neighbors is not None
        rows = step.queries[:, 0].long()
        self.rows += rows.tolist()
        return Neighbors(*(part[rows] for part in self.neighbors.parts))


class Masked(Gate):
    """Opens for given rows."""

    def __init__(self, mask: Any = None) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, step: Step) -> Tensor:
        return torch.tensor(self.mask)


class Model:
    device = torch.device("cpu")


def mixture_of(retriever: Retriever, gate: Gate | None, combiner: Combiner | None = None) -> Mixture:
    memory = RamMemory(torch.empty(0, 2), torch.empty(0), [], [])
    return Mixture(Model(), memory, retriever, combiner or FixedCombiner(0.6, TEMPERATURE), gate)  # type: ignore[arg-type]


def numbered(logits: Tensor) -> Step:
    return Step(torch.arange(len(logits)).float()[:, None].expand(-1, 2), logits, torch.arange(len(logits)))


def test_rows_that_the_gate_closes_are_not_searched_and_keep_their_logits() -> None:
    neighbors, logits = make_neighbors(9), logits_of(9)
    mask = [row in (0, 1, 3, 8) for row in range(ROWS)]
    retriever = Given(neighbors)
    mixed = mixture_of(retriever, Masked(mask))(numbered(logits))
    assert retriever.rows == [0, 1, 3, 8]
    whole = mixture_of(Given(neighbors), None)(numbered(logits))
    assert mixed[mask].equal(whole[mask])
    closed = [not opened for opened in mask]
    assert mixed[closed].equal(logits[closed])
    assert not whole[closed].equal(logits[closed])


def test_gates_that_are_all_open_or_all_closed_are_no_gate_or_the_plain_model() -> None:
    neighbors, logits = make_neighbors(10), logits_of(10)
    none = mixture_of(Given(neighbors), None)(numbered(logits))
    for gate in (OpenGate(), Masked([True] * ROWS), ConfidenceGate(1.0)):
        assert mixture_of(Given(neighbors), gate)(numbered(logits)).equal(none)
    for gate in (Masked([False] * ROWS), ConfidenceGate(0.0)):
        assert mixture_of(Given(neighbors), gate)(numbered(logits)).equal(logits)
    assert PlainModel()(numbered(logits)) is logits


def test_neighbors_spread_over_closed_rows_and_back() -> None:
    neighbors = make_neighbors(11)
    mask = torch.tensor([True, False] * 4 + [True])
    rows = mask.nonzero().flatten()
    wide = Neighbors(*(part[rows] for part in neighbors.parts)).spread(mask)
    assert all(one[mask].equal(two[mask]) for one, two in zip(wide.parts, neighbors.parts, strict=True))
    assert wide.found.tolist() == (neighbors.found & mask).tolist()
    assert (wide.distances[~mask] == torch.inf).all() and (wide.ids[~mask] == -1).all()


def test_the_knn_distribution_is_one_where_there_are_neighbors() -> None:
    neighbors = make_neighbors(12)
    sums = knn_probs(knn_log_weights(neighbors.distances, 3.0), neighbors.values, VOCABULARY).sum(1)
    torch.testing.assert_close(sums, neighbors.found.float())


def test_rows_belong_to_their_sentences_whatever_the_beams() -> None:
    for beams in (1, 2, 5):
        assert sentences_of_rows(3 * beams, 3).tolist() == [row // beams for row in range(3 * beams)]
    assert sentences_of_rows(0, 0).tolist() == []
    step = Step(torch.randn(6, 2), torch.randn(6, 4), sentences_of_rows(6, 3))
    mask = torch.tensor([True, False, False, True, True, False])
    assert step.rows(mask).sentence.tolist() == [0, 1, 2] and len(step.rows(mask)) == 3
    assert step.rows(mask).logits.equal(step.logits[mask])
