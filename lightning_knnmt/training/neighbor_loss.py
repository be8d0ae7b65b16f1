"""How well held-out tokens are predicted with neighbors from a small store of training keys."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_knnmt.knn.probability import knn_log_weights, token_log_probs
from lightning_knnmt.metric import Metric, distances

SHARES = (0.1, 0.3, 0.5, 0.7)  # λ
SCALES = (0.1, 0.2, 0.4, 0.8, 1.6, 3.2)  # T, in units of the neighbors' median spread
AT_ONCE = 256  # queries whose distances are in memory


@dataclass(frozen=True)
class NeighborLoss:
    """Negative log-likelihood per token of the mixture λ p_kNN + (1 − λ) p_model.

    Attributes:
        value: Scalar, on the half of the queries that λ and T were not chosen on.
        lambda_: λ.
        temperature: T.
    """

    value: Tensor
    lambda_: float
    temperature: float


def neighbor_loss(
    keys: Tensor,
    values: Tensor,
    queries: Tensor,
    tokens: Tensor,
    log_probs: Tensor,
    k: int = 8,
    metric: Metric = "l2",
) -> NeighborLoss:
    """The loss of held-out tokens with exact neighbors; λ and T by every second query, the loss by the others.

    So a model whose keys find nothing, or whose own predictions are ruined, has a high loss, however even its keys
    lie.

    Args:
        keys: Of the store, shape (N, D).
        values: Their tokens, shape (N,).
        queries: Held-out keys, shape (R, D).
        tokens: What follows them, shape (R,).
        log_probs: The model's own log-probability of these tokens, shape (R,).
        k: Neighbors.
        metric: By what they are near.
    """
    found, near = [], []
    for part in queries.split(AT_ONCE):
        nearest = distances(part, keys, metric).topk(min(k, len(keys)), largest=False)
        found.append(nearest.values)
        near.append(values[nearest.indices])
    far, of_neighbors = torch.cat(found), torch.cat(near)  # [R, K] each
    scale = float(far[:, 0].median() if metric == "l2" else (far[:, -1] - far[:, 0]).median())
    scale = max(scale, torch.finfo(torch.float32).eps)
    chosen = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    chosen[::2] = True
    best: NeighborLoss | None = None
    lowest = math.inf
    for factor in SCALES:
        knn = token_log_probs(knn_log_weights(far, factor * scale), of_neighbors, tokens)
        for share in SHARES:
            mixed = -torch.logaddexp(math.log(share) + knn, math.log1p(-share) + log_probs)
            if float(mixed[chosen].mean()) < lowest or best is None:
                lowest = float(mixed[chosen].mean())
                rest = mixed[~chosen] if len(queries) > 1 else mixed
                best = NeighborLoss(rest.mean(), share, factor * scale)
    assert best is not None
    return best
