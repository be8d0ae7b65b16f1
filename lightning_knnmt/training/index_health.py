"""How well an index over the keys of a model in training would be balanced."""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.index.clustering import assign_to_lists
from lightning_knnmt.index.config import choose_nlist
from lightning_knnmt.training.metrics import (
    Homogeneity,
    ImbalanceFactor,
    KeySample,
    MeanResultantLength,
    SphericalVariance,
)
from lightning_knnmt.training.pictures import list_size_histogram, log_figure


class IndexHealth(L.Callback):
    """Build the lists of an inverted file over held-out keys in each validation, and log how even they are.

    Logs `val/imbalance_factor`, `val/homogeneity`, `val/mean_resultant_length`, `val/spherical_variance`,
    `val/codes_scanned` (expected codes that a query scans in an index of the sample, nprobe · N · imbalance / nlist),
    and the picture `val/list_sizes`. The values are there before any checkpoint or early stop looks for them. Even keys
    without structure have an imbalance factor of about 1 + nlist / N: compare only samples of one size.

    Args:
        nlist: Lists; None: the power of two nearest to the square root of the number of keys.
        max_keys: Keys sampled uniformly from the validation split.
        nprobe: Lists that a query scans.
        seed: Seed of the sample and of k-means.
        picture: Whether to draw the histogram of list sizes.
    """

    def __init__(
        self, nlist: int | None = None, max_keys: int = 50_000, nprobe: int = 8, seed: int = 1, picture: bool = True
    ) -> None:
        for name, value in {"nlist": nlist, "max_keys": max_keys, "nprobe": nprobe}.items():
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}, expected 1 or more")
        if nlist is not None and nlist > max_keys:
            raise ValueError(f"nlist is {nlist}, expected at most max_keys={max_keys}")
        self.nlist, self.max_keys, self.nprobe, self.seed, self.picture = nlist, max_keys, nprobe, seed, picture
        self.sample: KeySample | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new sample, the same in every validation."""
        self.sample = KeySample(self.max_keys, self.seed, trainer.global_rank).to(pl_module.device)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Offer the batch's keys to the sample."""
        if trainer.sanity_checking:
            return
        if not isinstance(outputs, Mapping) or "keys" not in outputs:
            raise ValueError("IndexHealth needs the keys that the validation_step of TranslationModule returns")
        assert self.sample is not None
        self.sample.update(outputs["keys"].float(), outputs["tokens"])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make the lists on the first process, measure on all, and log."""
        if trainer.sanity_checking or self.sample is None:
            return
        (keys, tokens), self.sample = self.sample.compute(), None
        nlist = choose_nlist(len(keys)) if self.nlist is None else self.nlist
        first = trainer.is_global_zero
        assigned = assign_to_lists(keys.cpu().numpy(), nlist, self.seed) if first else None
        lists = torch.from_numpy(trainer.strategy.broadcast(assigned)).to(keys.device)
        mine = slice(trainer.global_rank, None, trainer.world_size)  # the metrics sum over processes
        values = _measure(keys[mine], tokens[mine], lists[mine], nlist)
        values["codes_scanned"] = min(self.nprobe, nlist) * len(keys) * values["imbalance_factor"] / nlist
        for name, value in values.items():
            pl_module.log(f"val/{name}", value)
        if self.picture and first:
            sizes = torch.bincount(lists, minlength=nlist).cpu()
            log_figure(trainer, "val/list_sizes", list_size_histogram(sizes, trainer.global_step))


def _measure(keys: Tensor, tokens: Tensor, lists: Tensor, nlist: int) -> dict[str, float]:
    imbalance = ImbalanceFactor(nlist).to(keys.device)
    purity = Homogeneity().to(keys.device)
    length = MeanResultantLength(keys.shape[1]).to(keys.device)
    variance = SphericalVariance(keys.shape[1]).to(keys.device)
    imbalance.update(lists)
    purity.update(lists, tokens)
    length.update(keys)
    variance.update(keys)
    return {
        "imbalance_factor": float(imbalance.compute()),
        "homogeneity": float(purity.compute()),
        "mean_resultant_length": float(length.compute()),
        "spherical_variance": float(variance.compute()),
    }
