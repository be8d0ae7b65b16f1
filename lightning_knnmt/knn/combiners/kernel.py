"""A kernel whose bandwidth and share are learned from the query and the neighbors' keys (arXiv 2109.06379)."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_knnmt.checks import check_at_least, check_number, check_one_of
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.features import log_counts, log_shares, two_layers, zeroed
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.step import Step
from lightning_knnmt.knn.trained import TrainedPart

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.knn.memory import Memory

Kernel = Literal["gauss", "laplace"]


class KernelCombiner(TrainedPart, Combiner):
    """p_kNN by a kernel exp(−d / σ) or exp(−√d / σ) with σ = exp(w · [q; mean key] + b), λ = σ(MLP([q; weighted key])).

    Until it is trained it is the fixed combiner of its `temperature` with λ = 1/2 (Jiang et al., "Learning
    Kernel-Smoothed Machine Translation with Retrieved Examples", eq. 5 to 8; there d is squared in the one kernel only,
    as here). The neighbors' keys are read at every step.

    Args:
        key_size: D of the model, which is filled in where a combiner is trained; 0: not known yet.
        kernel: `gauss`: by the squared distance; `laplace`: by its root.
        temperature: The bandwidth that training begins with, in units of squared distance, or of distance.
        hidden: Units of the hidden layer of λ.
        k: The most neighbors that are looked at.
        folder: Where a trained one was written, whose options are taken; None: not trained.
        any_store: Take another datastore of the same model than that of the training.

    Raises:
        ValueError: An option is out of range, or the folder holds no such combiner.
    """

    sees_states = True

    def __init__(
        self,
        key_size: int = 0,
        kernel: Kernel = "gauss",
        temperature: float = 10.0,
        hidden: int = 32,
        k: int = 16,
        folder: Path | None = None,
        any_store: bool = False,
    ) -> None:
        super().__init__()
        options = self._open(
            folder, any_store, key_size=key_size, kernel=kernel, temperature=temperature, hidden=hidden, k=k
        )
        self.key_size, self.kernel, self.temperature = options["key_size"], options["kernel"], options["temperature"]
        self.hidden, self.k = options["hidden"], options["k"]
        check_at_least(0, key_size=self.key_size)
        check_at_least(1, hidden=self.hidden, k=self.k)
        check_number(above_zero=True, temperature=self.temperature)
        check_one_of(get_args(Kernel), kernel=self.kernel)
        self._memory: Memory | None = None
        if self.key_size:
            self._build()
        self._restore()

    def _build(self) -> None:
        self.bandwidth = zeroed(nn.Linear(2 * self.key_size, 1))
        self.share = two_layers(2 * self.key_size, self.hidden, nn.ReLU())
        nn.init.constant_(self.bandwidth.bias, math.log(self.temperature))

    def bind(self, model: "KeyedModel", memory: "Memory") -> None:
        """Read keys from this memory from now on.

        Raises:
            ValueError: It was trained for another model or datastore.
        """
        super().bind(model, memory)
        self._memory = memory
        if self.kernel == "laplace" and memory.metric != "l2":
            raise ValueError(f"kernel is 'laplace', the root of a distance, but the metric is {memory.metric!r}")
        if not self.key_size:
            self.key_size = memory.key_size
            self._build()
            self.to(self.scale.device)
        if self.key_size != memory.key_size:
            raise ValueError(f"key_size is {self.key_size}, expected {memory.key_size} as the datastore has")

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """λ and shares by what the two networks make of query and keys."""
        assert self._memory is not None, "bind comes first"
        near = neighbors.first(self.k)
        found = near.distances.isfinite()
        keys = self._memory.keys_of(near.ids)  # [R, K, D]
        unit = (self.scale / self.key_size).sqrt()  # so that inputs are about 1
        queries = step.queries.float() / unit
        mean = keys.sum(1) / found.sum(1, keepdim=True).clamp(min=1) / unit
        log_bandwidth = self.bandwidth(torch.cat([queries, mean], 1))  # [R, 1]
        distances = torch.where(found, near.distances, 0.0)
        distances = distances - distances[:, :1] if self.kernel == "gauss" else distances.sqrt()
        shares = log_shares(log_counts(near) - distances * torch.exp(-log_bandwidth), found)
        weighted = (shares.exp()[:, :, None] * keys).sum(1) / unit
        lambda_ = torch.sigmoid(self.share(torch.cat([queries, weighted], 1)))
        return Weights(_widened(shares, neighbors.ids.shape[1]), lambda_)


def _widened(shares: Tensor, k: int) -> Tensor:
    return torch.nn.functional.pad(shares, (0, k - shares.shape[1]), value=-math.inf)
