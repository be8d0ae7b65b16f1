"""From raw vectors to directions: what all dispersion losses have in common."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from lightning_knnmt.checks import check_at_least, check_one_of

Reduction = Literal["mean", "sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)


def on_directions(x: Tensor, loss: Callable[[Tensor], Tensor], reduction: str = "mean") -> Tensor:
    """Apply a loss to the directions of x, outside autocast and in at least float32.

    Args:
        x: Raw vectors, shape (N, D). Zero vectors have no direction: they are dropped and get a zero gradient.
        loss: Maps unit vectors, shape (N, D) with N of at least 2, to a scalar averaged per point.
        reduction: "mean" keeps the average per point; "sum" multiplies it by the number of points that were kept.

    Returns:
        Scalar; 0 with a graph attached if fewer than two vectors are left.

    Raises:
        ValueError: If x is not a matrix of floating-point numbers or `reduction` is unknown.

    >>> points = torch.tensor([[3.0, 0.0], [0.0, 0.5], [0.0, 0.0]])
    >>> on_directions(points, lambda unit: unit.sum(1).mean())
    tensor(1.)
    >>> on_directions(points, lambda unit: unit.sum(1).mean(), reduction="sum")  # of the two that have a direction
    tensor(2.)
    """
    check_one_of(REDUCTIONS, reduction=reduction)
    with torch.autocast(x.device.type, enabled=False):
        points = directions(x)
        if len(points) < 2:
            return points[:0].sum()
        mean = loss(points)
        return mean * len(points) if reduction == "sum" else mean


def directions(x: Tensor) -> Tensor:
    """Unit vectors x / ‖x‖ of the rows that have a direction.

    Args:
        x: Raw vectors, shape (N, D).

    Returns:
        Unit vectors, shape (N', D) with N' ≤ N: rows of norm zero are dropped. Float64 if x is, else float32.

    Raises:
        ValueError: If x is not a matrix of floating-point numbers.

    >>> directions(torch.tensor([[3.0, 4.0], [0.0, 0.0]]))
    tensor([[0.6000, 0.8000]])
    """
    if x.ndim != 2 or not x.is_floating_point():
        raise ValueError(
            f"x has shape {tuple(x.shape)} and type {x.dtype}, expected floating-point vectors of shape (N, D); "
            "flatten the leading dimensions first, or use the modules of lightning_knnmt.dispersion."
        )
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norms = torch.linalg.vector_norm(x.detach(), dim=-1)
    x = x[~(norms <= torch.finfo(x.dtype).tiny)]  # written so that NaN rows stay, and show in the loss
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)


def subsample(points: Tensor, max_points: int, generator: torch.Generator | None = None) -> Tensor:
    """A uniform sample without replacement of at most `max_points` rows.

    Args:
        points: Shape (N, D).
        max_points: Largest number of rows to keep, at least 2.
        generator: Source of randomness, drawn from only when N is larger than `max_points`.

    Returns:
        Shape (min(N, max_points), D).

    Raises:
        ValueError: If `max_points` is below 2.

    >>> subsample(torch.eye(5), max_points=3, generator=torch.Generator().manual_seed(1)).argmax(dim=1)
    tensor([0, 4, 2])
    """
    check_at_least(2, max_points=max_points)
    if len(points) <= max_points:
        return points
    rows = torch.randperm(len(points), generator=generator, device=draw_device(points.device, generator))[:max_points]
    return points[rows.to(points.device)]


def normal(
    shape: tuple[int, ...], generator: torch.Generator | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Standard normal numbers on `device`, drawn on the generator's own device.

    >>> normal((2, 3), torch.Generator().manual_seed(1), torch.float64, torch.device("cpu")).shape
    torch.Size([2, 3])
    """
    return torch.randn(shape, generator=generator, dtype=dtype, device=draw_device(device, generator)).to(device)


def draw_device(device: torch.device, generator: torch.Generator | None) -> torch.device:
    """Device to draw on: the generator's, so that a CPU generator gives the same numbers for GPU tensors.

    >>> draw_device(torch.device("cuda"), torch.Generator())
    device(type='cpu')
    """
    return device if generator is None else generator.device


def angle(a: Tensor, b: Tensor) -> Tensor:
    """Geodesic distance of paired unit vectors, accurate and with finite gradients at 0 and π, unlike acos of a·b.

    Args:
        a: Unit vectors, shape (N, D).
        b: Unit vectors, shape (N, D).

    Returns:
        Angles in [0, π], shape (N,).

    >>> angle(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [-1.0, 0.0]]))
    tensor([1.5708, 3.1416])
    """
    return 2 * torch.atan2(torch.linalg.vector_norm(a - b, dim=-1), torch.linalg.vector_norm(a + b, dim=-1))
