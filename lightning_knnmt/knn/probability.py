"""The kNN distribution and its mixture with the model's, in log space: pure functions on tensors.

Shapes: R rows (sentences × beams), K neighbors, V vocabulary.
Distances are those of `Neighbors`: smaller is nearer, +inf where a neighbor is missing.
"""

import math
from collections.abc import Sequence
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional as F


def knn_log_weights(distances: Tensor, temperature: float, weights: Tensor | None = None) -> Tensor:
    """Log of each neighbor's share of the kNN distribution, log softmax(−d / T), or log softmax(log w − d / T).

    The nearest distance is subtracted first: a small T then leaves the nearest neighbor, and overflows nowhere.

    Args:
        distances: Of `Neighbors`, shape (R, K).
        temperature: T, in units of distance (squared L2, or similarity), more than 0.
        weights: w, how many entries each neighbor stands for (arXiv 2204.12608), shape (R, K); None: one each.

    Returns:
        Shape (R, K), float32; a row without any neighbor is −inf throughout.

    >>> knn_log_weights(torch.tensor([[1.0, 1.0, torch.inf]]), 10.0).exp()
    tensor([[0.5000, 0.5000, 0.0000]])
    >>> knn_log_weights(torch.tensor([[1.0, 1.0]]), 10.0, torch.tensor([[3, 1]])).exp()
    tensor([[0.7500, 0.2500]])
    """
    distances = distances.float()
    nearest = distances.amin(-1, keepdim=True) if distances.shape[-1] else distances
    temperature = max(temperature, torch.finfo(torch.float32).tiny)  # which would be 0 in float32, and 0 / 0
    scores = (distances - nearest.nan_to_num(posinf=0.0)).neg().div(temperature)
    if weights is not None:
        scores = scores + weights.log()
    return (scores - torch.logsumexp(scores, -1, keepdim=True)).nan_to_num(nan=-math.inf, neginf=-math.inf)


def knn_probs(log_weights: Tensor, values: Tensor, vocabulary_size: int) -> Tensor:
    """The kNN distribution p_kNN(y) = Σ_i 1[y = v_i] w_i (arXiv 2010.00710, eq. 2).

    Args:
        log_weights: log w, shares of the neighbors, shape (R, K).
        values: Token ids, shape (R, K).
        vocabulary_size: V.

    Returns:
        Shape (R, V); a row without any neighbor is 0.

    >>> knn_probs(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[2, 2]]), 4)
    tensor([[0., 0., 1., 0.]])
    """
    weights = log_weights.exp()
    return weights.new_zeros(len(weights), vocabulary_size).scatter_add_(1, values, weights)


def token_log_probs(log_weights: Tensor, values: Tensor, tokens: Tensor) -> Tensor:
    """log p_kNN of one token of each row.

    Args:
        log_weights: Shares of the neighbors, shape (R, K).
        values: Token ids, shape (R, K).
        tokens: Shape (R,).

    Returns:
        Shape (R,); −inf where no neighbor has the token.

    >>> token_log_probs(torch.tensor([[0.25, 0.75]]).log(), torch.tensor([[1, 2]]), torch.tensor([2])).exp()
    tensor([0.7500])
    """
    return log_or_minus_inf((log_weights.exp() * (values == tokens[:, None])).sum(1))


def log_or_minus_inf(probabilities: Tensor) -> Tensor:
    """Logarithm whose gradient is 0, not infinite, where a probability is 0: combiners are trained through it.

    >>> p = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> log_or_minus_inf(p).exp().sum().backward()
    >>> p.grad
    tensor([0., 1.])
    """
    positive = probabilities > 0
    return torch.where(positive, torch.where(positive, probabilities, 1.0).log(), -math.inf)


def neighbor_log_probs(log_weights: Tensor, values: Tensor) -> Tensor:
    """log p_kNN of each neighbor's token: neighbors with the same token carry the same sum.

    Args:
        log_weights: Shares of the neighbors, shape (R, K).
        values: Token ids, shape (R, K).

    Returns:
        Shape (R, K), so that only the retrieved tokens are touched, never the vocabulary.

    >>> neighbor_log_probs(torch.tensor([[0.25, 0.5, 0.25]]).log(), torch.tensor([[3, 7, 3]])).exp()
    tensor([[0.5000, 0.5000, 0.5000]])
    """
    tokens, order = values.sort(1)
    run = F.pad((tokens[:, 1:] != tokens[:, :-1]).cumsum(1), (1, 0))  # [sorted neighbor -> run of equal tokens]
    weights = log_weights.exp().gather(1, order)
    sums = torch.zeros_like(weights).scatter_add_(1, run, weights)
    return torch.empty_like(weights).scatter_(1, order, sums.gather(1, run)).log_()


def mix_logits(
    logits: Tensor,
    values: Tensor,
    log_probs: Tensor,
    lambda_: float | Tensor,
    log_normalizer: Tensor,
    in_place: bool = False,
) -> Tensor:
    """Logits z' with softmax(z') = λ p_kNN + (1 − λ) softmax(z).

    For λ < 1, z'_y = logaddexp(z_y, lse(z) + log(λ / (1 − λ)) + log p_kNN(y)) for the retrieved y, z'_y = z_y for
    all others. Rows without any neighbor are left as they are, whatever λ.

    Args:
        logits: z, shape (R, V).
        values: Retrieved token ids, shape (R, K).
        log_probs: log p_kNN of each retrieved token as `neighbor_log_probs` gives it, shape (R, K).
        lambda_: λ in [0, 1]: one number, or one of each row, shape (R, 1).
        log_normalizer: lse(z), shape (R, 1).
        in_place: Write into `logits` if they are float32; over a large vocabulary a copy costs more than the mixing.

    Returns:
        Shape (R, V), float32: half precision would round the mixture by some percent.

    >>> z = torch.zeros(1, 2)
    >>> mix_logits(z, torch.tensor([[0]]), torch.zeros(1, 1), 0.5, z.logsumexp(1, True)).softmax(1)
    tensor([[0.7500, 0.2500]])
    """
    if isinstance(lambda_, float | int) and lambda_ == 0:
        return logits
    logits = logits.clone() if logits.dtype == torch.float32 and not in_place else logits.float()
    before = logits.gather(1, values)  # [R, K]
    log_probs = log_probs.float()
    if isinstance(lambda_, Tensor):
        lambda_ = lambda_.float()
        alone = (lambda_ >= 1) & log_probs.isfinite().any(1, keepdim=True)  # [R, 1], rows of neighbors only
        logits.masked_fill_(alone, -math.inf)
        shift = lambda_.log() - torch.log1p(-lambda_)
        added = torch.where(log_probs.isfinite(), log_normalizer + shift + log_probs, -math.inf)  # λ = 1: not ∞ − ∞
        retrieved = torch.where(alone, log_probs, torch.logaddexp(before, added))
    elif lambda_ == 1:
        found = log_probs.isfinite().any(1, keepdim=True)  # [R, 1]
        logits.masked_fill_(found, -math.inf)
        retrieved = torch.where(found, log_probs, before)
    else:
        odds = math.log(lambda_) - math.log1p(-lambda_)
        retrieved = torch.logaddexp(before, log_normalizer + odds + log_probs)
    return logits.scatter_(1, values, retrieved)


def mean_log_probs(logits: Sequence[Tensor], log_normalizers: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """log Σ_m w_m softmax(z_m): the mean of the distributions of an ensemble.

    Args:
        logits: z_m of each model, shape (R, V).
        log_normalizers: lse(z_m) of each, shape (R, 1).
        weights: w_m of each, more than 0; scaled to add up to 1.

    Returns:
        Shape (R, V), float32.

    >>> one, two = torch.tensor([[0.2, 0.8]]).log(), torch.tensor([[0.6, 0.4]]).log()
    >>> mean_log_probs([one, two], [torch.zeros(1, 1)] * 2, [1.0, 3.0]).exp()
    tensor([[0.5000, 0.5000]])
    """
    shares = [weight / sum(weights) for weight in weights]
    terms = zip(logits, log_normalizers, shares, strict=True)
    log_probs = [each.float() + (math.log(share) - normalizer) for each, normalizer, share in terms]
    return reduce(torch.logaddexp, log_probs)
