"""Losses over pairs of points: energies and kernels of all pairs, or each point's nearest neighbor (arXiv 2502.08231).

All build one (N, N) matrix of cosines. Where N is above `max_points`, they act on a random sample of that many points.
Energies and kernels treat points closer than about 1e-3 rad (float32) as being that far apart, without a gradient.
"""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_knnmt.checks import check_number, check_one_of
from lightning_knnmt.dispersion.functional.directions import Reduction, angle, on_directions, subsample

Kernel = Literal["gaussian", "laplace", "riesz"]
Metric = Literal["chordal", "geodesic"]
KERNELS: tuple[str, ...] = get_args(Kernel)
METRICS: tuple[str, ...] = get_args(Metric)


def minimum_hyperspherical_energy(
    x: Tensor,
    s: float = 1.0,
    max_points: int = 4096,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Riesz s-energy mean_i mean_{j≠i} a_ij^{-s} of the angles a_ij = acos(x̂_i·x̂_j); −log a_ij at s = 0 (MHE).

    Minimum hyperspherical energy of Liu et al. (arXiv 1805.09298) in the geodesic form of arXiv 2502.08231.

    Args:
        x: Raw vectors, shape (N, D).
        s: Power, at least 0.
        max_points: Points to sample where N is larger.
        generator: Source of randomness of that sample.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise.

    Raises:
        ValueError: If `s` is negative, `max_points` below 2, or x is not a floating-point matrix.

    >>> minimum_hyperspherical_energy(torch.eye(3))  # every angle is π/2, so every 1 / angle 2/π
    tensor(0.6366)
    """
    return mmd_dispersion(x, "riesz", "geodesic", s=s, max_points=max_points, generator=generator, reduction=reduction)


def mmd_dispersion(
    x: Tensor,
    kernel: Kernel = "gaussian",
    metric: Metric = "chordal",
    bandwidth: float = 1.0,
    s: float = 1.0,
    max_points: int = 4096,
    generator: torch.Generator | None = None,
    reduction: Reduction = "mean",
) -> Tensor:
    """Kernel dispersion mean_i mean_{j≠i} κ(d_ij): the squared MMD to the uniform distribution up to a constant.

    The cross term and the uniform term of the MMD do not depend on x, because κ is invariant under rotation
    (arXiv 2502.08231).

    Args:
        x: Raw vectors, shape (N, D).
        kernel: "gaussian" exp(−d² / 2b²), "laplace" exp(−d / b), or "riesz" d^{-s} (−log d at s = 0).
        metric: "chordal", d² = 2 − 2 x̂_i·x̂_j, or "geodesic", d = acos(x̂_i·x̂_j).
        bandwidth: b of the Gaussian and Laplace kernels, in the unit of d; the Riesz kernel has none.
        s: Power of the Riesz kernel, at least 0.
        max_points: Points to sample where N is larger.
        generator: Source of randomness of that sample.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise.

    Raises:
        ValueError: If an option is unknown or out of range, or x is not a floating-point matrix.

    >>> mmd_dispersion(torch.eye(3))  # every squared distance is 2, so every kernel value exp(−1)
    tensor(0.3679)
    """
    check_one_of(KERNELS, kernel=kernel)
    check_one_of(METRICS, metric=metric)
    check_number(above_zero=True, bandwidth=bandwidth)
    check_number(s=s)

    def loss(points: Tensor) -> Tensor:
        points = subsample(points, max_points, generator)
        n = len(points)
        limit = 1 - 8 * torch.finfo(points.dtype).eps  # acos and sqrt have no finite slope at 1
        cosines = (points @ points.T).clamp(-limit, limit)  # (N, N)
        distances = cosines.acos() if metric == "geodesic" else (2 - 2 * cosines).sqrt()
        if kernel == "gaussian":
            values = (-0.5 * (distances / bandwidth).square()).exp()
        elif kernel == "laplace":
            values = (-distances / bandwidth).exp()
        else:
            values = -distances.log() if s == 0 else distances.pow(-s)
        self_pairs = torch.eye(n, dtype=torch.bool, device=points.device)
        return values.masked_fill(self_pairs, 0.0).sum() / (n * (n - 1))

    return on_directions(x, loss, reduction)


def koleo(
    x: Tensor, max_points: int = 4096, generator: torch.Generator | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Kozachenko–Leonenko entropy loss −mean_i log min_{j≠i} ‖x̂_i − x̂_j‖ (Sablayrolles et al., arXiv 1806.03198).

    Args:
        x: Raw vectors, shape (N, D).
        max_points: Points to sample where N is larger; nearest neighbors are then those in the sample.
        generator: Source of randomness of that sample.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise. Distances are counted as at least the type's epsilon, so that copies stay finite.

    Raises:
        ValueError: If `max_points` is below 2 or x is not a floating-point matrix.

    >>> koleo(torch.eye(3))  # every distance is √2
    tensor(-0.3466)
    """

    def loss(points: Tensor, nearest: Tensor) -> Tensor:
        distances = torch.linalg.vector_norm(points - nearest, dim=-1)
        return -distances.clamp_min(torch.finfo(points.dtype).eps).log().mean()

    return _on_nearest(x, loss, max_points, generator, reduction)


def mma(
    x: Tensor, max_points: int = 4096, generator: torch.Generator | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Maximum minimum angle −mean_i min_{j≠i} acos(x̂_i·x̂_j) (MMA; Wang et al., arXiv 2006.06527).

    Args:
        x: Raw vectors, shape (N, D).
        max_points: Points to sample where N is larger; nearest neighbors are then those in the sample.
        generator: Source of randomness of that sample.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise, in [−π, 0].

    Raises:
        ValueError: If `max_points` is below 2 or x is not a floating-point matrix.

    >>> mma(torch.eye(3))  # every angle is π/2
    tensor(-1.5708)
    """
    return _on_nearest(x, lambda points, nearest: -angle(points, nearest).mean(), max_points, generator, reduction)


def mmcs(
    x: Tensor, max_points: int = 4096, generator: torch.Generator | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Maximum cosine mean_i max_{j≠i} (1 + x̂_i·x̂_j) (MMCS; hyperspherical prototypes, arXiv 1901.10514).

    Args:
        x: Raw vectors, shape (N, D).
        max_points: Points to sample where N is larger; nearest neighbors are then those in the sample.
        generator: Source of randomness of that sample.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise, in [0, 2].

    Raises:
        ValueError: If `max_points` is below 2 or x is not a floating-point matrix.

    >>> mmcs(torch.eye(3))  # every cosine is 0
    tensor(1.)
    """

    def loss(points: Tensor, nearest: Tensor) -> Tensor:
        return 1 + (points * nearest).sum(dim=-1).mean()

    return _on_nearest(x, loss, max_points, generator, reduction)


def _on_nearest(
    x: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    max_points: int,
    generator: torch.Generator | None,
    reduction: Reduction,
) -> Tensor:
    """Apply a loss to the points and each one's nearest neighbor, both unit vectors of shape (N, D) with gradient."""

    def paired(points: Tensor) -> Tensor:
        points = subsample(points, max_points, generator)
        with torch.no_grad():
            nearest = (points @ points.T).fill_diagonal_(-torch.inf).argmax(dim=1)  # [point -> nearest point]
        return loss(points, points[nearest])

    return on_directions(x, paired, reduction)
