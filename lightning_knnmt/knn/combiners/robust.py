"""Each neighbor is weighed by how sure the model is, and was, of its value (arXiv 2210.08808)."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_knnmt.checks import check_at_least, check_number, check_share
from lightning_knnmt.knn.combiners.combiner import Combiner, Weights
from lightning_knnmt.knn.features import (
    distinct_counts,
    exactly,
    log_counts,
    log_shares,
    neighbor_confidence,
    scaled_distances,
    top_log_probs,
    two_layers,
)
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.step import Step
from lightning_knnmt.knn.trained import TrainedPart

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.knn.memory import Memory

TOP = 8  # of the model's probabilities, which say how sure it is
LEAST = -20.0  # log-probability, below which all values are equally unlikely
STORED = "stored_log_probs"


class RobustCombiner(TrainedPart, Combiner):
    """p_kNN ∝ Σ_i 1[y = v_i] exp(−d_i / T + c_i): c_i is the confidence in a neighbor, T and λ are learned too.

    c_i comes from log p_NMT(v_i) now and log p_NMT(v_i) when it was stored, T from distances and how many different
    values are among the nearest, λ from these and the model's largest probabilities (Jiang et al., "Towards Robust
    k-Nearest-Neighbor Machine Translation", eq. 5 to 9). In training, a share of the rows that fades out gets keys with
    noise, or a neighbor that is right and near the query.

    What the model thought when an entry was stored is the projection of its key, so that keys must be decoder outputs;
    it is computed once, and kept with the parameters (2 bytes an entry).

    Args:
        k: K, the neighbors that are looked at.
        temperature: T that training begins with, in units of squared distance.
        hidden: Units of the hidden layers.
        disturbed: Share of the rows that are disturbed when training begins, half of them by noise on the keys, half
            by a neighbor that is right.
        noise: Size of the noise, as a share of a usual distance.
        folder: Where a trained one was written, whose options are taken; None: not trained.
        any_store: Take another datastore of the same model than that of the training.

    Raises:
        ValueError: An option is out of range, or the folder holds no such combiner.
    """

    stored: Tensor

    def __init__(
        self,
        k: int = 8,
        temperature: float = 10.0,
        hidden: int = 32,
        disturbed: float = 0.5,
        noise: float = 0.1,
        folder: Path | None = None,
        any_store: bool = False,
    ) -> None:
        super().__init__()
        options = self._open(
            folder, any_store, k=k, temperature=temperature, hidden=hidden, disturbed=disturbed, noise=noise
        )
        self.k, self.temperature, self.hidden = options["k"], options["temperature"], options["hidden"]
        self.disturbed, self.noise = options["disturbed"], options["noise"]
        check_at_least(1, k=self.k, hidden=self.hidden)
        check_number(above_zero=True, temperature=self.temperature)
        check_share(disturbed=self.disturbed)
        check_number(noise=self.noise)
        self.register_buffer("stored", torch.empty(0), persistent=False)
        self.confidence = two_layers(2, self.hidden, nn.Tanh())
        self.warmth = two_layers(2 * self.k, self.hidden, nn.Tanh())
        self.share = two_layers(2 * self.k + TOP, self.hidden, nn.Tanh())
        self._memory: Memory | None = None
        self._restore()

    def bind(self, model: "KeyedModel", memory: "Memory") -> None:
        """Find out what the model thought of every entry, but for those whose log-probabilities are known.

        Raises:
            ValueError: It was trained for another model or datastore, or keys are no decoder outputs.
        """
        super().bind(model, memory)
        self._memory = memory
        if model.config.key_type != "decoder_output":
            raise ValueError(
                f"key_type is {model.config.key_type!r}, expected 'decoder_output' for a RobustCombiner: the model's "
                "probabilities are computed from the stored keys, which no others allow"
            )
        if memory.metric != "l2":
            raise ValueError(f"metric is {memory.metric!r}, expected 'l2' for a RobustCombiner, whose noise is on keys")
        if len(self.stored) < len(memory):
            missing = stored_log_probs(model, memory, len(self.stored))
            self.stored = torch.cat([self.stored.to(missing.device), missing]).to(self.scale.device)

    def tables(self) -> dict[str, Tensor]:
        """The log-probabilities of the stored values."""
        return {STORED: self.stored.half()}

    def take_tables(self, tables: dict[str, Tensor]) -> None:
        """Take the log-probabilities of the stored values."""
        if STORED in tables:
            self.stored = tables[STORED].float()

    def weigh(self, step: Step, neighbors: Neighbors) -> Weights:
        """λ and shares by what the three networks make of the neighbors and of the model's prediction."""
        near = exactly(neighbors, self.k)
        found = near.distances.isfinite()
        now = neighbor_confidence(step, near).clamp(min=LEAST)
        known = near.ids >= 0  # a neighbor that training has put in stands for the present context
        then = torch.where(known, self.stored[near.ids.clamp(min=0)] if len(self.stored) else now, now).clamp(min=LEAST)
        trust = self.confidence(torch.stack([now, then], 2)).squeeze(2)  # [R, K]
        seen = torch.cat([scaled_distances(near, self.scale), distinct_counts(near) / self.k], 1)  # [R, 2 K]
        temperature = self.temperature * torch.exp(self.warmth(seen))  # [R, 1]
        distances = torch.where(found, near.distances - near.distances[:, :1].nan_to_num(posinf=0.0), 0.0)
        shares = log_shares(log_counts(near) + trust - distances / temperature, found)
        lambda_ = torch.sigmoid(self.share(torch.cat([seen, top_log_probs(step, TOP).clamp(min=LEAST)], 1)))
        k = neighbors.ids.shape[1]
        return Weights(F.pad(shares, (0, max(0, k - self.k)), value=-math.inf)[:, :k], lambda_)

    def training_neighbors(self, step: Step, neighbors: Neighbors, tokens: Tensor, progress: float) -> Neighbors:
        """The neighbors, some of them disturbed, at first in a share of `disturbed` rows, at last in none."""
        draw = torch.rand(len(step), device=tokens.device)
        share = self.disturbed * (1 - progress)
        near = exactly(neighbors, self.k)
        noisy = self._with_noise(step, near)
        helped = self._with_right_neighbor(near, tokens)
        rows = draw[:, None]
        parts = zip(near.parts, noisy.parts, helped.parts, strict=True)
        distances, values, ids = (
            torch.where(rows < share / 2, b, torch.where(rows < share, c, a)) for a, b, c in parts
        )
        return Neighbors(distances, values, ids, near.weights)

    def _with_noise(self, step: Step, near: Neighbors) -> Neighbors:
        assert self._memory is not None, "bind comes first"
        keys = self._memory.keys_of(near.ids)  # [R, K, D]
        size = self.noise * (self.scale / keys.shape[2]).sqrt()
        moved = keys + size * torch.randn_like(keys) - step.queries.float()[:, None]
        distances = torch.where(near.ids >= 0, moved.square().sum(2), math.inf)
        distances, order = distances.sort(dim=1, stable=True)
        moved_near = near.gather(order)
        return Neighbors(distances, moved_near.values, moved_near.ids)

    def _with_right_neighbor(self, near: Neighbors, tokens: Tensor) -> Neighbors:
        """The reference's token in front, as near as noise alone would have it."""
        size = (self.noise**2 * self.scale).expand(len(tokens), 1)
        nearest = torch.minimum(size, near.distances[:, :1])
        distances = torch.cat([nearest, near.distances[:, :-1]], 1)
        values = torch.cat([tokens[:, None], near.values[:, :-1]], 1)
        return Neighbors(distances, values, torch.cat([torch.full_like(tokens, -1)[:, None], near.ids[:, :-1]], 1))


@torch.no_grad()
def stored_log_probs(model: "KeyedModel", memory: "Memory", first: int = 0, block: int = 1024) -> Tensor:
    """log p_NMT of the value of every entry in the context that its key stands for, shape (N − first,), float32.

    Args:
        model: Its output projection turns keys into logits.
        memory: Keys and values.
        first: The first entry that is asked for.
        block: Entries whose logits are held at a time.
    """
    found = [torch.empty(0, device=model.device)]
    for ids in torch.arange(first, len(memory), device=model.device).split(block):
        logits = model.project(memory.keys_of(ids[:, None])[:, 0].to(dtype=getattr(torch, model.dtype))).float()
        values = memory.values_of(ids[:, None])
        found.append((logits.gather(1, values) - logits.logsumexp(1, keepdim=True)).squeeze(1))
    return torch.cat(found)
