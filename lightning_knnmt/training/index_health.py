"""How well an index over the keys of a model in training would be balanced."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import Tensor

from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.checks import check_at_least
from lightning_knnmt.dispersion import functional as F
from lightning_knnmt.index.balance import imbalance, purity, scanned
from lightning_knnmt.index.config import IndexConfig, choose_nlist
from lightning_knnmt.index.splitting import metric_centroids
from lightning_knnmt.metric import Metric, distances, seen_by
from lightning_knnmt.training.datamodule import TranslationDataModule
from lightning_knnmt.training.metrics import KeySample
from lightning_knnmt.training.module import TranslationModule
from lightning_knnmt.training.neighbor_loss import neighbor_loss
from lightning_knnmt.training.pictures import list_size_histogram, log_figure


@dataclass(frozen=True)
class Health:
    """An inverted file over N keys, measured.

    Attributes:
        sizes: Entries of each list, shape (nlist,).
        values: Scalars by the names under which they are logged, on the device of the keys.
    """

    sizes: Tensor
    values: dict[str, Tensor]


def index_health(
    keys: Tensor,
    tokens: Tensor,
    queries: Tensor,
    centroids: Tensor,
    nprobe: int,
    chunk: int = 4096,
    metric: Metric = "l2",
) -> Health:
    """Put keys into the lists of their nearest centroids, and measure the lists and what queries scan of them.

    Args:
        keys: Entries of the index, shape (N, D).
        tokens: Their target tokens, shape (N,).
        queries: Keys that are not in the index, shape (R, D).
        centroids: Of the lists, shape (nlist, D).
        nprobe: Lists that a query scans; all, if there are fewer.
        chunk: Keys whose distances are held in memory at once.
        metric: By what keys are near to centroids.
    """
    lists = nearest_lists(keys, centroids, 1, chunk, metric)[:, 0]
    sizes = torch.bincount(lists, minlength=len(centroids))
    probed = nearest_lists(queries, centroids, min(nprobe, len(centroids)), chunk, metric)
    length = F.mean_resultant_length(keys)
    values = {
        "imbalance_factor": imbalance(sizes),
        "homogeneity": purity(lists, tokens),
        "mean_resultant_length": length,
        "spherical_variance": 1 - length,
        "codes_scanned": scanned(sizes, probed),
    }
    return Health(sizes, values)


def nearest_lists(keys: Tensor, centroids: Tensor, number: int, chunk: int = 4096, metric: Metric = "l2") -> Tensor:
    """The lists with the nearest centroids of each key, nearest first: (N, D), (nlist, D) -> (N, number).

    >>> centroids = torch.tensor([[0.0, 0.0], [5.0, 0.0], [9.0, 0.0]])
    >>> nearest_lists(torch.tensor([[8.0, 1.0]]), centroids, number=2)
    tensor([[2, 1]])
    """
    by: Metric = "l2" if metric == "l2" else "ip"  # centroids are compared as they are, also by cosine
    found = [
        distances(seen_by(part, metric), centroids, by).topk(number, largest=False).indices
        for part in keys.split(chunk)
    ]
    return torch.cat(found)


class IndexHealth(L.Callback):
    """Build the lists of an inverted file over held-out keys in each validation, and log how even they are.

    Logs `val/imbalance_factor`, `val/homogeneity`, `val/mean_resultant_length`, `val/spherical_variance`,
    `val/codes_scanned`, `val/knn_loss`, and the picture `val/list_sizes`. `val/codes_scanned` is measured: the mean
    number of entries that other keys of the validation split, which are not in the index, scan as queries.
    `val/knn_loss` is the negative log-likelihood of these queries' tokens with neighbors from a small store of training
    keys: what evenness is for, and what no ruined model has. The values are there before
    any checkpoint or early stop looks for them. Even keys without structure have an imbalance factor of about
    1 + nlist / N: compare only samples of one size.

    Args:
        nlist: Lists; None: the power of two nearest to the square root of the number of keys.
        max_keys: Keys in the index, sampled uniformly from the validation split.
        nprobe: Lists that a query scans.
        queries: Keys sampled as queries beside those; at most a tenth of the validation split's keys.
        seed: Seed of the sample and of k-means.
        picture: Whether to draw the histogram of list sizes.
        metric: By what keys are near: `l2`, `ip` or `cos`, as the index that is to be built.
        spherical: Whether centroids have unit norm, under `ip` and `cos`; None: they do.
        knn_tokens: Target tokens of the training split whose keys make the store behind `val/knn_loss`; 0: no such
            loss.
        k: Neighbors of each query there.
    """

    def __init__(
        self,
        nlist: int | None = None,
        max_keys: int = 50_000,
        nprobe: int = 8,
        queries: int = 2000,
        seed: int = 1,
        picture: bool = True,
        metric: Metric = "l2",
        spherical: bool | None = None,
        knn_tokens: int = 20_000,
        k: int = 8,
    ) -> None:
        check_at_least(1, nlist=nlist, max_keys=max_keys, nprobe=nprobe, queries=queries, k=k)
        check_at_least(0, knn_tokens=knn_tokens)
        self.lists = IndexConfig(metric=metric, spherical=spherical)  # which checks them
        self.knn_tokens, self.k = knn_tokens, k
        if nlist is not None and nlist > max_keys:
            raise ValueError(f"nlist is {nlist}, expected at most max_keys={max_keys}")
        self.nlist, self.max_keys, self.nprobe, self.queries = nlist, max_keys, nprobe, queries
        self.seed, self.picture = seed, picture
        self.sample: KeySample | None = None

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a new sample, the same in every validation."""
        wanted = self.max_keys + self.queries
        self.sample = KeySample(wanted, self.seed, trainer.global_rank).to(pl_module.device)

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
        """Measure on the first process, and log on all."""
        if trainer.sanity_checking or self.sample is None:
            return
        (keys, tokens), self.sample = self.sample.compute(), None  # of all processes
        values: dict[str, float] = {}
        if trainer.is_global_zero:
            health = self._measure(keys, tokens)
            values = {name: float(value) for name, value in health.values.items()}
            if (loss := self._neighbor_loss(trainer, pl_module, keys, tokens)) is not None:
                values["knn_loss"] = loss
            if self.picture:
                log_figure(trainer, "val/list_sizes", list_size_histogram(health.sizes.cpu(), trainer.global_step))
        for name, value in trainer.strategy.broadcast(values).items():
            pl_module.log(f"val/{name}", value)

    def _measure(self, keys: Tensor, tokens: Tensor) -> Health:
        if len(keys) < 2:
            raise ValueError(f"the validation split has {len(keys)} target token, expected 2 or more for IndexHealth")
        held_out = self._held_out(keys)
        queries, keys, tokens = keys[:held_out], keys[held_out:], tokens[held_out:]
        nlist = choose_nlist(len(keys)) if self.nlist is None else self.nlist
        metric, unit = self.lists.metric, self.lists.unit_centroids
        sample = seen_by(keys, metric).cpu().numpy()
        centroids = torch.from_numpy(metric_centroids(sample, nlist, metric, unit, self.seed)).to(keys.device)
        return index_health(keys, tokens, queries, centroids, self.nprobe, metric=metric)

    def _held_out(self, keys: Tensor) -> int:
        """How many keys of the sample are queries: the first ones."""
        return max(1, min(self.queries, len(keys) // 10))

    def _neighbor_loss(
        self, trainer: L.Trainer, module: L.LightningModule, keys: Tensor, tokens: Tensor
    ) -> float | None:
        """The loss of the queries' tokens with neighbors; None if there is no training split to take them from."""
        data = getattr(trainer, "datamodule", None)
        if not self.knn_tokens or not isinstance(data, TranslationDataModule) or "train" not in data.splits:
            return None
        assert isinstance(module, TranslationModule)
        parts = [module.states(batch.to(module.device)) for batch in data.sample(self.knn_tokens, self.seed)]
        stored, values = (torch.cat(part) for part in zip(*parts, strict=True))
        queries, wanted = (part[: self._held_out(keys)] for part in (keys, tokens))
        log_probs = [
            module.backbone.project(rows).float().log_softmax(1).gather(1, right[:, None])[:, 0]
            for rows, right in zip(queries.split(256), wanted.split(256), strict=True)
        ]
        loss = neighbor_loss(stored.float(), values, queries, wanted, torch.cat(log_probs), self.k, self.lists.metric)
        return float(loss.value)
