"""Dispersion losses as modules: choose one in a configuration by `class_path`, its options by `init_args`.

Each spreads the directions of a batch's vectors over the sphere; added to the translation loss with weight γ, it
trains keys that fill an index's lists evenly (arXiv 2509.16729). The mathematics is in `dispersion.functional`.
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from lightning_knnmt.checks import check_at_least, check_number, check_one_of
from lightning_knnmt.dispersion import functional as F
from lightning_knnmt.dispersion.functional.directions import REDUCTIONS
from lightning_knnmt.dispersion.functional.pairwise import KERNELS, METRICS


class Dispersion(nn.Module, ABC):
    """Base of all dispersion losses: flattens a batch, keeps its real tokens, and gives a scalar to minimise.

    Args:
        reduction: "mean" over the tokens, comparable with cross-entropy per token, or "sum".

    >>> keys = torch.eye(3).reshape(1, 3, 3)  # (B, T, D)
    >>> MaximumMeanCosine()(keys, mask=torch.tensor([[True, True, False]]))
    tensor(1.)
    """

    def __init__(self, reduction: F.Reduction = "mean") -> None:
        super().__init__()
        check_one_of(REDUCTIONS, reduction=reduction)
        self.reduction: F.Reduction = reduction

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Loss of the directions of a batch of vectors.

        Args:
            x: Raw vectors, shape (..., D), for example decoder outputs (B, T, D).
            mask: Boolean, shape (...), True for real tokens; None if all are.

        Returns:
            Scalar to minimise, float32 (float64 if x is); 0 with a graph attached if fewer than two vectors are real.

        Raises:
            ValueError: If the mask's type or shape does not fit x.
        """
        if mask is None:
            return self.loss(x.flatten(end_dim=-2) if x.ndim > 1 else x)
        if mask.dtype != torch.bool or mask.shape != x.shape[:-1]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)} and type {mask.dtype}, expected shape {tuple(x.shape[:-1])}, that "
                "of x without its last dimension, and type torch.bool, True for real tokens; use mask.bool()"
            )
        return self.loss(x[mask])

    @abstractmethod
    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""

    @property
    def configuration(self) -> dict[str, Any]:
        """The class and its options, as a configuration file has them."""
        hidden = ("training",)
        options = {k: v for k, v in vars(self).items() if k not in hidden and not k.startswith("_")}
        return {"class_path": f"{type(self).__module__}.{type(self).__qualname__}", "init_args": options}

    def extra_repr(self) -> str:
        """The options, so that a logged model says what it was trained with."""
        return ", ".join(f"{k}={v!r}" for k, v in self.configuration["init_args"].items())


class GreatCircleDispersion(Dispersion):
    """Base of the losses that average over great circles.

    Args:
        circles: Great circles drawn for each batch.
        reduction: "mean" over the tokens, or "sum".
    """

    def __init__(self, circles: int = 1, reduction: F.Reduction = "mean") -> None:
        super().__init__(reduction)
        check_at_least(1, circles=circles)
        self.circles = circles


class SlicedDispersion(GreatCircleDispersion):
    """Sliced dispersion on random great circles: `dispersion.functional.sliced_dispersion`.

    Args:
        circles: Great circles drawn for each batch; the paper uses one.
        reduction: "mean" over the tokens, or "sum".
    """

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.sliced_dispersion(points, self.circles, reduction=self.reduction)


class AxisAlignedSlicedDispersion(GreatCircleDispersion):
    """Sliced dispersion on random coordinate pairs: `dispersion.functional.axis_aligned_sliced_dispersion`.

    Args:
        circles: Coordinate pairs drawn for each batch.
        reduction: "mean" over the tokens, or "sum".
    """

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.axis_aligned_sliced_dispersion(points, self.circles, reduction=self.reduction)


class MeanResultantLength(Dispersion):
    """Length of the mean direction, 1 − spherical variance: `dispersion.functional.mean_resultant_length`.

    It is the regulariser that arXiv 2509.16729 names after the spherical variance.
    """

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.mean_resultant_length(points, reduction=self.reduction)


class PairwiseDispersion(Dispersion):
    """Base of the losses that compare all pairs of points.

    Args:
        max_points: Points sampled from a batch that has more, so that no larger matrix of pairs is built.
        reduction: "mean" over the tokens, or "sum".
    """

    def __init__(self, max_points: int = 4096, reduction: F.Reduction = "mean") -> None:
        super().__init__(reduction)
        check_at_least(2, max_points=max_points)
        self.max_points = max_points


class HypersphericalEnergy(PairwiseDispersion):
    """Riesz energy of the angles: `dispersion.functional.minimum_hyperspherical_energy`.

    Args:
        s: Power of the energy, at least 0; 0 is the logarithm.
        max_points: Points sampled from a batch that has more.
        reduction: "mean" over the tokens, or "sum".
    """

    def __init__(self, s: float = 1.0, max_points: int = 4096, reduction: F.Reduction = "mean") -> None:
        super().__init__(max_points, reduction)
        check_number(s=s)
        self.s = s

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.minimum_hyperspherical_energy(points, self.s, self.max_points, reduction=self.reduction)


class KernelDispersion(PairwiseDispersion):
    """Kernel (MMD) dispersion: `dispersion.functional.mmd_dispersion`.

    Args:
        kernel: "gaussian", "laplace" or "riesz".
        metric: "chordal" (Euclidean distance of the directions) or "geodesic" (angle).
        bandwidth: Bandwidth of the Gaussian and Laplace kernels, in the metric's unit.
        s: Power of the Riesz kernel, at least 0.
        max_points: Points sampled from a batch that has more.
        reduction: "mean" over the tokens, or "sum".
    """

    def __init__(
        self,
        kernel: F.Kernel = "gaussian",
        metric: F.Metric = "chordal",
        bandwidth: float = 1.0,
        s: float = 1.0,
        max_points: int = 4096,
        reduction: F.Reduction = "mean",
    ) -> None:
        super().__init__(max_points, reduction)
        check_one_of(KERNELS, kernel=kernel)
        check_one_of(METRICS, metric=metric)
        check_number(above_zero=True, bandwidth=bandwidth)
        check_number(s=s)
        self.kernel: F.Kernel = kernel
        self.metric: F.Metric = metric
        self.bandwidth = bandwidth
        self.s = s

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.mmd_dispersion(
            points, self.kernel, self.metric, self.bandwidth, self.s, self.max_points, reduction=self.reduction
        )


class KoLeo(PairwiseDispersion):
    """Nearest-neighbor entropy loss: `dispersion.functional.koleo`."""

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.koleo(points, self.max_points, reduction=self.reduction)


class MaximumMinimumAngle(PairwiseDispersion):
    """Angle to the nearest neighbor (MMA): `dispersion.functional.mma`."""

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.mma(points, self.max_points, reduction=self.reduction)


class MaximumMeanCosine(PairwiseDispersion):
    """Mean of the largest cosines (MMCS): `dispersion.functional.mmcs`."""

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.mmcs(points, self.max_points, reduction=self.reduction)


class Lloyd(Dispersion):
    """Quantisation of uniform samples: `dispersion.functional.lloyd`.

    Args:
        samples: Uniform directions drawn for each batch; several times the tokens of a batch.
        reduction: "mean" over the tokens, or "sum".
    """

    def __init__(self, samples: int = 256, reduction: F.Reduction = "mean") -> None:
        super().__init__(reduction)
        check_at_least(1, samples=samples)
        self.samples = samples

    def loss(self, points: Tensor) -> Tensor:
        """Scalar loss of raw vectors of shape (N, D)."""
        return F.lloyd(points, self.samples, reduction=self.reduction)
