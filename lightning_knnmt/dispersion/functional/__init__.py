"""Losses that spread the directions of a set of vectors over the unit sphere (arXiv 2502.08231, 2509.16729).

Every function takes raw vectors x of shape (N, D), acts on their directions x / ‖x‖ in at least float32 (also under
autocast) and returns a scalar to minimise, averaged per point. Fewer than two points give 0 with a graph attached;
zero vectors have no direction and are dropped; NaN and infinity are not hidden.
"""

from lightning_knnmt.dispersion.functional.directions import Reduction
from lightning_knnmt.dispersion.functional.pairwise import (
    Kernel,
    Metric,
    koleo,
    minimum_hyperspherical_energy,
    mma,
    mmcs,
    mmd_dispersion,
)
from lightning_knnmt.dispersion.functional.sliced import (
    axis_aligned_sliced_dispersion,
    great_circle_loss,
    random_great_circles,
    sliced_dispersion,
)
from lightning_knnmt.dispersion.functional.uniform import lloyd, mean_resultant_length, spherical_variance

__all__ = [
    "Kernel",
    "Metric",
    "Reduction",
    "axis_aligned_sliced_dispersion",
    "great_circle_loss",
    "koleo",
    "lloyd",
    "mean_resultant_length",
    "minimum_hyperspherical_energy",
    "mma",
    "mmcs",
    "mmd_dispersion",
    "random_great_circles",
    "sliced_dispersion",
    "spherical_variance",
]
