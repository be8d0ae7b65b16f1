"""Metrics of keys and of how they fill an index; updated in pieces and summed over processes (torchmetrics).

Each takes tensors and gives a tensor on the same device.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lightning_knnmt.checks import check_at_least
from lightning_knnmt.dispersion.functional.directions import directions
from lightning_knnmt.index.balance import imbalance, purity


class ImbalanceFactor(Metric):
    """Imbalance factor of an index's lists: `index.balance.imbalance`.

    Args:
        nlist: Number of lists.
    """

    higher_is_better = False
    full_state_update = False
    sizes: Tensor

    def __init__(self, nlist: int) -> None:
        super().__init__()
        check_at_least(1, nlist=nlist)
        self.nlist = nlist
        self.add_state("sizes", torch.zeros(nlist, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, lists: Tensor) -> None:
        """Count entries.

        Args:
            lists: The list of each entry, shape (N,).

        Raises:
            ValueError: A list's number is not below nlist.
        """
        if lists.numel() and not 0 <= int(lists.min()) <= int(lists.max()) < self.nlist:
            raise ValueError(
                f"lists holds numbers from {int(lists.min())} to {int(lists.max())}, "
                f"expected 0 to nlist - 1 = {self.nlist - 1}"
            )
        self.sizes += torch.bincount(lists, minlength=self.nlist)

    def compute(self) -> Tensor:
        """The factor; 1 is perfect."""
        return imbalance(self.sizes).float()


class Homogeneity(Metric):
    """Homogeneity of target tokens over an index's lists: `index.balance.purity`."""

    higher_is_better = True
    full_state_update = False
    lists: list[Tensor]
    tokens: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("lists", [], dist_reduce_fx="cat")
        self.add_state("tokens", [], dist_reduce_fx="cat")

    def update(self, lists: Tensor, tokens: Tensor) -> None:
        """Add entries.

        Args:
            lists: The list of each entry, shape (N,).
            tokens: The target token of each entry, shape (N,).

        Raises:
            ValueError: The shapes differ.
        """
        if lists.shape != tokens.shape:
            raise ValueError(
                f"lists has shape {tuple(lists.shape)} and tokens {tuple(tokens.shape)}, expected one of each per entry"
            )
        self.lists.append(lists)
        self.tokens.append(tokens)

    def compute(self) -> Tensor:
        """A value in [0, 1]; 1 if each list holds entries of one token only."""
        return purity(dim_zero_cat(self.lists), dim_zero_cat(self.tokens)).float()


class MeanResultantLength(Metric):
    """Length of the mean direction ‖mean x̂‖ of vectors: 0 if they balance, 1 if all point the same way.

    The dispersion loss of the same name minimises it. Zero vectors have no direction and do not count.

    Args:
        key_size: D.
    """

    higher_is_better = False
    full_state_update = False
    total: Tensor
    count: Tensor

    def __init__(self, key_size: int) -> None:
        super().__init__()
        self.add_state("total", torch.zeros(key_size), dist_reduce_fx="sum")
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")

    def update(self, keys: Tensor) -> None:
        """Add vectors of shape (N, D)."""
        unit = directions(keys.detach())
        self.total += unit.sum(dim=0)
        self.count += len(unit)

    def compute(self) -> Tensor:
        """A value in [0, 1]; 0 for no vectors."""
        return (self.total / self.count.clamp(min=1)).norm()


class SphericalVariance(MeanResultantLength):
    """Spherical variance 1 − ‖mean x̂‖ of vectors, the complement of the mean resultant length: 1 if they balance.

    Args:
        key_size: D.
    """

    higher_is_better = True

    def compute(self) -> Tensor:
        """A value in [0, 1]."""
        return 1 - super().compute()


class KeySample(Metric):
    """A uniform sample without replacement of keys and their tokens from a stream of unknown length.

    Every entry draws a random priority; those with the lowest are kept. The same stream and seed give the same sample.

    Args:
        max_keys: Largest number of entries to keep.
        seed: Seed of the priorities.
        rank: This process's number, so that processes draw differently.
    """

    full_state_update = False
    keys: list[Tensor]
    tokens: list[Tensor]
    priorities: list[Tensor]

    def __init__(self, max_keys: int, seed: int = 1, rank: int = 0) -> None:
        super().__init__()
        check_at_least(1, max_keys=max_keys)
        self.max_keys, self.seed, self.rank = max_keys, seed, rank
        for name in ("keys", "tokens", "priorities"):
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forget everything, and draw the same priorities again."""
        super().reset()
        self._held = 0
        self._generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.rank)

    def update(self, keys: Tensor, tokens: Tensor) -> None:
        """Offer N entries.

        Args:
            keys: Shape (N, D).
            tokens: Their target tokens, shape (N,).
        """
        priorities = torch.rand(len(keys), generator=self._generator)
        self.keys.append(keys.detach())
        self.tokens.append(tokens)
        self.priorities.append(priorities.to(keys.device))
        self._held += len(keys)
        if self._held > 2 * self.max_keys:  # seldom, so that sorting costs little
            kept = self._lowest()
            self.keys, self.tokens, self.priorities = [kept[0]], [kept[1]], [kept[2]]
            self._held = self.max_keys

    def compute(self) -> tuple[Tensor, Tensor]:
        """Keys and tokens of the sample, shapes (N', D) and (N',) with N' ≤ max_keys.

        Their order is drawn, too: any first part is a uniform sample itself.

        Raises:
            ValueError: Nothing was offered.
        """
        if not len(self.keys):
            raise ValueError("no keys were offered to the sample, expected a batch or more before compute")
        return self._lowest()[:2]

    def _lowest(self) -> tuple[Tensor, Tensor, Tensor]:
        keys, tokens, priorities = (dim_zero_cat(part) for part in (self.keys, self.tokens, self.priorities))
        rows = priorities.argsort(stable=True)[: self.max_keys]
        return keys[rows], tokens[rows], priorities[rows]
