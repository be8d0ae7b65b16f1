"""The kNN distribution and its mixture with the model's, in log space.

Shapes: R rows (sentences × beams), K neighbors, V vocabulary.
Distances are squared L2, +inf where a neighbor is missing.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_log_weights(distances: Tensor, temperature: float) -> Tensor:
    """Log of each neighbor's share of the kNN distribution, log softmax(−d / T).

    Args:
        distances: Squared L2 distances, shape (R, K).
        temperature: T, in units of squared distance, more than 0.

    Returns:
        Shape (R, K), float32; a row without any neighbor is −inf throughout.
    """
    scores = distances.float().neg().div(temperature)
    return (scores - torch.logsumexp(scores, -1, keepdim=True)).nan_to_num(nan=-math.inf, neginf=-math.inf)


def knn_probs(distances: Tensor, values: Tensor, temperature: float, vocabulary_size: int) -> Tensor:
    """The kNN distribution p_kNN(y) ∝ Σ_i 1[y = v_i] exp(−d_i / T) (arXiv 2010.00710, eq. 2).

    Args:
        distances: Squared L2 distances, shape (R, K).
        values: Token ids, shape (R, K).
        temperature: T, more than 0.
        vocabulary_size: V.

    Returns:
        Shape (R, V); a row without any neighbor is 0.
    """
    weights = knn_log_weights(distances, temperature).exp()
    return weights.new_zeros(len(weights), vocabulary_size).scatter_add_(1, values, weights)


def neighbor_log_probs(distances: Tensor, values: Tensor, temperature: float) -> Tensor:
    """log p_kNN of each neighbor's token: neighbors with the same token carry the same sum.

    Args:
        distances: Squared L2 distances, shape (R, K).
        values: Token ids, shape (R, K).
        temperature: T, more than 0.

    Returns:
        Shape (R, K), so that only the retrieved tokens are touched, never the vocabulary.
    """
    tokens, order = values.sort(1)
    run = F.pad((tokens[:, 1:] != tokens[:, :-1]).cumsum(1), (1, 0))  # [sorted neighbor -> run of equal tokens]
    weights = knn_log_weights(distances, temperature).exp().gather(1, order)
    sums = torch.zeros_like(weights).scatter_add_(1, run, weights)
    return torch.empty_like(weights).scatter_(1, order, sums.gather(1, run)).log_()


def mix_logits(logits: Tensor, values: Tensor, log_probs: Tensor, lambda_: float, in_place: bool = False) -> Tensor:
    """Logits z' with softmax(z') = λ p_kNN + (1 − λ) softmax(z).

    For λ < 1, z'_y = logaddexp(z_y, lse(z) + log(λ / (1 − λ)) + log p_kNN(y)) for the retrieved y, z'_y = z_y for
    all others: one reduction over V. Rows without any neighbor are left as they are, whatever λ.

    Args:
        logits: z, shape (R, V).
        values: Retrieved token ids, shape (R, K).
        log_probs: log p_kNN of each retrieved token as `neighbor_log_probs` gives it, shape (R, K).
        lambda_: λ in [0, 1].
        in_place: Write into `logits` if they are float32; over a large vocabulary a copy costs more than the mixing.

    Returns:
        Shape (R, V), float32: half precision would round the mixture by some percent.
    """
    if lambda_ == 0:
        return logits
    logits = logits.clone() if logits.dtype == torch.float32 and not in_place else logits.float()
    before = logits.gather(1, values)  # [R, K]
    if lambda_ == 1:
        found = log_probs.isfinite().any(1, keepdim=True)  # [R, 1]
        logits.masked_fill_(found, -math.inf)
        retrieved = torch.where(found, log_probs.float(), before)
    else:
        shift = math.log(lambda_) - math.log1p(-lambda_)
        retrieved = torch.logaddexp(before, _logsumexp(logits) + shift + log_probs.float())
    return logits.scatter_(1, values, retrieved)


def _logsumexp(logits: Tensor) -> Tensor:
    """Shape (R, V) -> (R, 1), float32; on a CPU in blocks of rows whose temporaries stay in its cache."""
    rows = max(1, 2**19 // logits.shape[1]) if logits.device.type == "cpu" else max(1, len(logits))
    return torch.cat([torch.logsumexp(block, 1, keepdim=True) for block in logits.split(rows)])
