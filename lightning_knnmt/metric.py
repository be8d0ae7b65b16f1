"""By what a key is near to a query; every index, search and memory knows its metric by these names."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:  # torch is loaded where it is used: index.config, which names metrics, must start at once
    from torch import Tensor

Metric = Literal["l2", "ip", "cos"]


def seen_by(vectors: "Tensor", metric: Metric) -> "Tensor":
    """Vectors as a metric compares them: of unit norm for `cos`, otherwise as they are.

    Args:
        vectors: Shape (N, D).
        metric: The metric.
    """
    from torch.nn import functional as F

    return F.normalize(vectors.float(), dim=-1) if metric == "cos" else vectors


def distances(queries: "Tensor", keys: "Tensor", metric: Metric) -> "Tensor":
    """How far each key is from each query, (R, D), (N, D) -> (R, N); smaller is nearer, whatever the metric.

    Squared L2 for `l2`. The others are similarities and enter as −d: `ip` gives −⟨q, k⟩, `cos` −cos(q, k).

    >>> import torch
    >>> distances(torch.tensor([[3.0, 4.0]]), torch.tensor([[3.0, 0.0], [0.0, 2.0]]), "cos")
    tensor([[-0.6000, -0.8000]])
    """
    from torch import cdist

    queries, keys = seen_by(queries.float(), metric), seen_by(keys.float(), metric)
    return cdist(queries, keys).square() if metric == "l2" else -(queries @ keys.T)
