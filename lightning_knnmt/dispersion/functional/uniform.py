"""Losses that compare the points with the uniform distribution: its mean direction, its samples (arXiv 2502.08231)."""

import torch
from torch import Tensor

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.dispersion.functional.directions import Reduction, angle, directions, normal, on_directions


def spherical_variance(x: Tensor) -> Tensor:
    """Spherical variance 1 − ‖mean_i x̂_i‖, a measure of spread in [0, 1] (arXiv 2509.16729); larger is more spread.

    Its complement, `mean_resultant_length`, is the one to minimise.

    Args:
        x: Raw vectors, shape (N, D).

    Returns:
        Scalar; 0 for fewer than two vectors that have a direction.

    Raises:
        ValueError: If x is not a floating-point matrix.

    >>> spherical_variance(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor(0.2929)
    """
    points = directions(x)
    if len(points) < 2:
        return points[:0].sum()
    return 1 - torch.linalg.vector_norm(points.mean(dim=0))


def mean_resultant_length(x: Tensor, reduction: Reduction = "mean") -> Tensor:
    """Mean resultant length ‖mean_i x̂_i‖ = 1 − spherical variance: minimising it spreads the points.

    This is the loss that arXiv 2502.08231 and arXiv 2509.16729 name after the spherical variance, which it maximises.

    It sees the points' mean only: two opposite clumps are a minimum.

    Args:
        x: Raw vectors, shape (N, D).
        reduction: "mean", or "sum" (N times that).

    Returns:
        Scalar to minimise.

    Raises:
        ValueError: If x is not a floating-point matrix.

    >>> mean_resultant_length(torch.tensor([[2.0, 0.0], [0.0, 0.5]]))
    tensor(0.7071)
    >>> mean_resultant_length(torch.tensor([[2.0, 0.0], [-0.5, 0.0]]))
    tensor(0.)
    """
    return on_directions(x, lambda points: torch.linalg.vector_norm(points.mean(dim=0)), reduction)


def lloyd(
    x: Tensor, samples: int = 256, generator: torch.Generator | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Lloyd's quantisation loss E_y[min_i acos²(y·x̂_i)] over uniform directions y (arXiv 2502.08231).

    Points that are nearest to no sample get no gradient, so `samples` should be several times N.

    Args:
        x: Raw vectors, shape (N, D).
        samples: Number of uniform directions.
        generator: Source of randomness.
        reduction: "mean" over samples, or "sum" (N times that).

    Returns:
        Scalar to minimise.

    Raises:
        ValueError: If `samples` is below 1 or x is not a floating-point matrix.

    >>> cross = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> loss = lloyd(cross, samples=10_000, generator=torch.Generator().manual_seed(1))
    >>> round(float(loss), 1)  # the mean of the squared angles up to π/4 is π²/48
    0.2
    """
    check_at_least(1, samples=samples)

    def loss(points: Tensor) -> Tensor:
        uniform = directions(normal((samples, points.shape[1]), generator, points.dtype, points.device))
        with torch.no_grad():
            nearest = (uniform @ points.T).argmax(dim=1)  # [sample -> point]
        return angle(uniform, points[nearest]).square().mean()

    return on_directions(x, loss, reduction)
