"""Losses that spread keys over the sphere: modules for configurations, and their mathematics as pure functions."""

from lightning_knnmt.dispersion.losses import (
    AxisAlignedSlicedDispersion,
    Dispersion,
    GreatCircleDispersion,
    HypersphericalEnergy,
    KernelDispersion,
    KoLeo,
    Lloyd,
    MaximumMeanCosine,
    MaximumMinimumAngle,
    MeanResultantLength,
    PairwiseDispersion,
    SlicedDispersion,
)

__all__ = [
    "AxisAlignedSlicedDispersion",
    "Dispersion",
    "GreatCircleDispersion",
    "HypersphericalEnergy",
    "KernelDispersion",
    "KoLeo",
    "Lloyd",
    "MaximumMeanCosine",
    "MaximumMinimumAngle",
    "MeanResultantLength",
    "PairwiseDispersion",
    "SlicedDispersion",
]
