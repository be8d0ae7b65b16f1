"""Batches of searched steps for Lightning."""

from pathlib import Path
from typing import TYPE_CHECKING

import lightning as L
import numpy as np
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from lightning_knnmt.checks import check_at_least, check_share
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.training.steps import SearchedSteps, searched_steps, stored_pairs

if TYPE_CHECKING:
    from lightning_knnmt.training.parts import PartModule


class StepsDataModule(L.LightningDataModule):
    """Steps of held-out pairs, or of stored ones, each searched once before the training begins.

    Args:
        held_out: Pairs that are not in the datastore, a file written by `prepare_data.py`: the validation split, never
            the test split.
        validation_share: Share of the held-out pairs that the training does not see, and is validated on.
        stored: Train on so many pairs of the datastore instead, none of whose entries finds itself, and validate on
            all held-out pairs; 0: train on held-out pairs.
        max_tokens: Most tokens of a teacher-forced batch on either side.
        batch_size: Steps of a training batch.
        seed: Seed of draws and of the order of batches.
    """

    def __init__(
        self,
        held_out: Path,
        validation_share: float = 0.2,
        stored: int = 0,
        max_tokens: int = 2048,
        batch_size: int = 256,
        seed: int = 1,
    ) -> None:
        super().__init__()
        check_share(validation_share=validation_share)
        check_at_least(0, stored=stored)
        check_at_least(1, max_tokens=max_tokens, batch_size=batch_size)
        self.held_out, self.validation_share, self.stored = held_out, validation_share, stored
        self.max_tokens, self.batch_size, self.seed = max_tokens, batch_size, seed
        self.splits: dict[str, SearchedSteps] = {}

    def setup(self, stage: str) -> None:
        """Search for every step.

        Raises:
            ValueError: Nothing is left to train on, or to validate on.
        """
        if self.splits:
            return
        assert self.trainer is not None
        module: PartModule = self.trainer.lightning_module  # type: ignore[assignment]
        pairs = read_split(self.held_out)
        order = np.random.default_rng(self.seed).permutation(len(pairs)).tolist()
        kept = len(pairs) if self.stored else round(self.validation_share * len(pairs))
        if kept == 0 or (kept == len(pairs) and not self.stored):
            raise ValueError(
                f"validation_share is {self.validation_share}, which leaves {len(pairs) - kept} of {len(pairs)} pairs "
                f"of {self.held_out} to train on and {kept} to validate on, expected one or more of each"
            )
        firsts = None
        validation, train = [pairs[n] for n in order[:kept]], [pairs[n] for n in order[kept:]]
        if self.stored:
            train, firsts = stored_pairs(module.memory.datastore, self.stored, self.seed)
        parts = module.model, module.memory, module.retriever
        self.splits["train"] = searched_steps(*parts, train, self.max_tokens, firsts)
        self.splits["validation"] = searched_steps(*parts, validation, self.max_tokens)
        train_steps = self.splits["train"]
        module.part.set_scale(train_steps.step.queries, train_steps.neighbors.distances)

    def _loader(self, name: str, shuffle: bool) -> DataLoader[SearchedSteps]:
        steps = self.splits[name]
        rows = range(len(steps))
        generator = torch.Generator().manual_seed(self.seed)
        order = RandomSampler(rows, generator=generator) if shuffle else rows
        batches = BatchSampler(order, self.batch_size, drop_last=False)
        return DataLoader(steps, batch_size=None, sampler=batches)  # type: ignore[arg-type]

    def train_dataloader(self) -> DataLoader[SearchedSteps]:
        """Shuffled batches."""
        return self._loader("train", shuffle=True)

    def val_dataloader(self) -> DataLoader[SearchedSteps]:
        """Batches in their order."""
        return self._loader("validation", shuffle=False)
