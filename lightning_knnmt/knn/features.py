"""What trained combiners and gates look at: pure functions on the neighbors and on the model's prediction."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.step import Step

FARTHEST = 10.0  # times the usual distance, where a neighbor is missing or farther away
NOTHING = -1e30  # a score that leaves nothing of a share


def two_layers(inputs: int, hidden: int, activation: nn.Module) -> nn.Sequential:
    """A network of one output, which is 0 until it is trained."""
    return nn.Sequential(nn.Linear(inputs, hidden), activation, zeroed(nn.Linear(hidden, 1)))


def zeroed(layer: nn.Linear) -> nn.Linear:
    """The layer, with parameters of 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def exactly(neighbors: Neighbors, k: int) -> Neighbors:
    """The k nearest neighbors; where fewer were searched, the rest are missing.

    >>> exactly(Neighbors(torch.tensor([[1.0]]), torch.tensor([[7]]), torch.tensor([[0]])), 2).ids
    tensor([[ 0, -1]])
    """
    near = neighbors.first(k)
    more = (0, k - near.ids.shape[1])
    return Neighbors(
        F.pad(near.distances, more, value=math.inf),
        F.pad(near.values, more),
        F.pad(near.ids, more, value=-1),
        None if near.weights is None else F.pad(near.weights, more, value=1),
    )


def distinct_counts(neighbors: Neighbors) -> Tensor:
    """How many different values are among the i nearest neighbors, for each i, shape (R, K).

    >>> values = torch.tensor([[7, 7, 3, 7]])
    >>> distinct_counts(Neighbors(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), values, values))
    tensor([[1, 1, 2, 2]])
    """
    values, found = neighbors.values, neighbors.distances.isfinite()
    same = (values[:, :, None] == values[:, None, :]) & found[:, None, :]  # [R, K, K]
    seen = same.tril(-1).any(2)  # whether a nearer neighbor has the same value
    return (found & ~seen).cumsum(1)


def scaled_distances(neighbors: Neighbors, scale: Tensor) -> Tensor:
    """Distances in units of a usual one, at most `FARTHEST`, shape (R, K).

    Args:
        neighbors: Of R rows.
        scale: The usual distance, a number.
    """
    return (neighbors.distances / scale).nan_to_num(posinf=FARTHEST).clamp(-FARTHEST, FARTHEST)


def log_counts(neighbors: Neighbors) -> Tensor | float:
    """Log of how many entries each neighbor stands for, shape (R, K), or 0 where that is one."""
    return 0.0 if neighbors.weights is None else neighbors.weights.log()


def log_shares(scores: Tensor, found: Tensor) -> Tensor:
    """Log of the neighbors' shares, log softmax of their scores; −inf where there is no neighbor.

    Gradients are finite even where a row has no neighbor at all.

    Args:
        scores: Shape (..., K), finite where a neighbor was found.
        found: Whether it was, shape (..., K).

    >>> log_shares(torch.tensor([[0.0, 0.0, torch.inf]]), torch.tensor([[True, True, False]])).exp()
    tensor([[0.5000, 0.5000, 0.0000]])
    """
    shares = torch.where(found, scores, NOTHING).log_softmax(-1)
    return torch.where(found, shares, -math.inf)


def neighbor_confidence(step: Step, neighbors: Neighbors) -> Tensor:
    """The model's own log-probability of each neighbor's value now, shape (R, K)."""
    return step.logits.gather(1, neighbors.values).float() - step.log_normalizer


def top_log_probs(step: Step, count: int) -> Tensor:
    """The model's largest log-probabilities, largest first, shape (R, count)."""
    return step.logits.topk(count, 1).values.float() - step.log_normalizer
