"""Sliced dispersion: push the angles on random great circles towards equal spacing (arXiv 2502.08231)."""

import math

import torch
from torch import Tensor

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.dispersion.functional.directions import Reduction, draw_device, normal, on_directions


def sliced_dispersion(
    x: Tensor, circles: int = 1, generator: torch.Generator | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Sliced dispersion R = E_{p,q}[δ] over random great circles (arXiv 2502.08231; used by arXiv 2509.16729).

    Per point, fully collapsed points give π²/6 · (1 − 1/N²), uniform random ones π²/6 · (N − 1)/N² on average, and
    points equally spaced on every circle 0.

    Args:
        x: Raw vectors, shape (N, D).
        circles: Number of great circles to average over.
        generator: Source of randomness.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise.

    Raises:
        ValueError: If `circles` is below 1, D below 2, or x is not a floating-point matrix.

    >>> sliced_dispersion(torch.ones(1000, 4))  # all in one direction: π²/6, nearly
    tensor(1.6449)
    >>> cross = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    >>> bool(sliced_dispersion(cross) < 1e-9)  # equally spaced on the only great circle of two dimensions
    True
    """
    check_at_least(1, circles=circles)

    def loss(points: Tensor) -> Tensor:
        planes = random_great_circles(points.shape[1], circles, generator, points.dtype, points.device)
        projected = torch.einsum("nd,cdk->kcn", points, planes)  # (2, C, N)
        return great_circle_loss(_circle_angles(projected[0], projected[1])).mean()

    return on_directions(x, loss, reduction)


def axis_aligned_sliced_dispersion(
    x: Tensor, circles: int = 1, generator: torch.Generator | None = None, reduction: Reduction = "mean"
) -> Tensor:
    """Sliced dispersion on great circles through two random coordinate axes: no projection to compute.

    Args:
        x: Raw vectors, shape (N, D).
        circles: Number of coordinate pairs to average over.
        generator: Source of randomness.
        reduction: "mean" per point, or "sum" (N times that).

    Returns:
        Scalar to minimise.

    Raises:
        ValueError: If `circles` is below 1, D below 2, or x is not a floating-point matrix.

    >>> axis_aligned_sliced_dispersion(torch.ones(1000, 4), circles=3)  # all in one direction: π²/6, nearly
    tensor(1.6449)
    """
    check_at_least(1, circles=circles)

    def loss(points: Tensor) -> Tensor:
        _check_width(points.shape[1])
        scores = torch.rand(circles, points.shape[1], generator=generator, device=draw_device(points.device, generator))
        axes = scores.topk(2, dim=1).indices.to(points.device)  # (C, 2), two distinct axes, uniform
        return great_circle_loss(_circle_angles(points[:, axes[:, 0]].T, points[:, axes[:, 1]].T)).mean()

    return on_directions(x, loss, reduction)


def great_circle_loss(theta: Tensor) -> Tensor:
    """Distance of angles to equal spacing: δ / N with δ = ½ Σ_i (θ_i − θ*_i)² (arXiv 2502.08231).

    θ*_i = mean(θ) + φ_rank(i) with φ_k = 2πk/N − π − π/N, k = 1..N, is the nearest equally spaced set that keeps the
    order; ties are split by position. θ* is held constant: the gradient of mean(θ) cancels, as Σ_i (θ_i − θ*_i) = 0.
    In terms of Watson's statistic U² of a test of uniformity on the circle, δ / N = 2π²/N · (U² − 1/(12N)).

    Args:
        theta: Angles in radians, shape (..., N).

    Returns:
        Loss per point, shape (...).

    >>> great_circle_loss(torch.tensor([0.5, 0.5]))  # collapsed: π²/6 · (1 − 1/N²)
    tensor(1.2337)
    """
    n = theta.shape[-1]
    with torch.no_grad():
        order = theta.argsort(dim=-1, stable=True)  # [rank -> point]
        rank = order.argsort(dim=-1)  # [point -> rank]
        phi = (rank.to(theta.dtype) - (n - 1) / 2) * (2 * math.pi / n)
        target = theta.mean(dim=-1, keepdim=True) + phi
    return 0.5 * (theta - target).square().mean(dim=-1)


def random_great_circles(
    d: int,
    n: int = 1,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Great circles drawn uniformly: pairs of orthonormal vectors from the Stiefel manifold.

    Args:
        d: Dimension D, at least 2.
        n: Number of circles C.
        generator: Source of randomness.
        dtype: Type of the result, float32 or float64: QR knows no half precision.
        device: Device of the result.

    Returns:
        Shape (C, D, 2): columns p and q of the QR factor of a normal matrix, times sign(diag R).

    Raises:
        ValueError: If `d` is below 2.

    >>> planes = random_great_circles(5, 3)
    >>> planes.shape
    torch.Size([3, 5, 2])
    >>> torch.allclose(planes.mT @ planes, torch.eye(2).expand(3, 2, 2), atol=1e-6)
    True
    """
    _check_width(d)
    q, r = torch.linalg.qr(normal((n, d, 2), generator, dtype, torch.device(device)))
    return q * r.diagonal(dim1=-2, dim2=-1).sign().unsqueeze(-2)


def _circle_angles(along_p: Tensor, along_q: Tensor) -> Tensor:
    """Angles θ = atan2(x·q, x·p) of unit vectors, shape (C, N).

    A point orthogonal to the circle (length of the projection within rounding) has no angle: it counts as 0 and gets
    no gradient from that circle.
    """
    eps = torch.finfo(along_p.dtype).eps
    lost = (along_p.detach().square() + along_q.detach().square()) <= eps**2
    return torch.atan2(along_q.masked_fill(lost, 0.0), along_p.masked_fill(lost, 1.0))


def _check_width(d: int) -> None:
    if d < 2:
        raise ValueError(f"D is {d}, expected 2 or more: a great circle needs two dimensions")
