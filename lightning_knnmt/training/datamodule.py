"""Training and validation batches for Lightning."""

import random
from collections.abc import Iterator
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from torch.utils.data import DataLoader, Dataset

from lightning_knnmt.backbone.batch import Batch, collate
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.checks import check_at_least
from lightning_knnmt.data.batching import TokenBudgetSampler, token_budget_batches
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.training.resuming import ResumableBatches
from lightning_knnmt.training.stored_states import StateBatch, StoredStates

if TYPE_CHECKING:
    from lightning_knnmt.training import TranslationModule


class TokenizedPairs(Dataset[tuple[list[int], list[int]]]):
    """Token ids of a split, in memory.

    Attributes:
        sources: Source token ids, a list for each pair.
        targets: Target token ids, a list for each pair.
    """

    def __init__(self, sources: list[list[int]], targets: list[list[int]]) -> None:
        self.sources, self.targets = sources, targets

    @property
    def lengths(self) -> list[int]:
        """Tokens of the longer side of each pair."""
        return [max(len(src), len(tgt)) for src, tgt in zip(self.sources, self.targets, strict=True)]

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, item: int) -> tuple[list[int], list[int]]:
        return self.sources[item], self.targets[item]


class TranslationDataModule(L.LightningDataModule):
    """Token-budget batches of a prepared corpus.

    Args:
        train: Training split: a file written by `prepare_data.py`, or a datastore of the states that enter the trained
            part of the model, written by `build_index.py states`.
        validation: Validation split, either of them too.
        max_tokens: Most tokens of a training batch on either side, padding counted; of stored states, on the target's.
        validation_max_tokens: The same for validation batches.
        seed: Seed of the order of training batches.

    Raises:
        ValueError: A number is too small.
    """

    def __init__(
        self, train: Path, validation: Path, max_tokens: int = 4096, validation_max_tokens: int = 8192, seed: int = 1
    ) -> None:
        super().__init__()
        check_at_least(0, seed=seed)
        check_at_least(1, max_tokens=max_tokens, validation_max_tokens=validation_max_tokens)
        self.files = {"train": train, "validation": validation}
        self.max_tokens, self.validation_max_tokens, self.seed = max_tokens, validation_max_tokens, seed
        self.splits: dict[str, TokenizedPairs | StoredStates] = {}

    def setup(self, stage: str) -> None:
        """Tokenize what `stage` needs with the tokenizer of the module in training."""
        assert self.trainer is not None
        module: TranslationModule = self.trainer.lightning_module  # type: ignore[assignment]
        backbone = module.backbone
        for name in ("train", "validation") if stage == "fit" else ("validation",):
            if name not in self.splits and self.files[name].is_dir():
                self.splits[name] = self._stored(name, module)
            if name not in self.splits:
                pairs = list(backbone.split_pairs(read_split(self.files[name])))
                if not pairs:
                    raise ValueError(f"{name} is {self.files[name]}, which is empty; expected one pair or more")
                ids = backbone.tokenize([pair.src for pair in pairs], [pair.tgt for pair in pairs])
                self.splits[name] = TokenizedPairs(ids.src, ids.tgt)
        self._pad_id = backbone.pad_id

    def _stored(self, name: str, module: "TranslationModule") -> StoredStates:
        """A split of stored states.

        Raises:
            ValueError: The module trains more than what follows them, or they are of another model.
        """
        if module.hparams["trainable"] == "all" or not isinstance(module.backbone, PretrainedModel):
            raise ValueError(
                f"{name} is {self.files[name]}, stored states, but trainable is {module.hparams['trainable']!r}; "
                "expected last_block or adapters, of which the states are the input"
            )
        return StoredStates(self.files[name], module.backbone)

    def _loader(self, name: str, max_tokens: int, shuffle: bool) -> DataLoader[Any]:
        assert self.trainer is not None
        split = self.splits[name]
        sampler = TokenBudgetSampler(
            split.lengths, max_tokens, shuffle, self.seed, self.trainer.global_rank, self.trainer.world_size
        )
        collate: Any = split.collate if isinstance(split, StoredStates) else self._collate
        return DataLoader(split, batch_sampler=sampler, collate_fn=collate)

    def _collate(self, items: list[tuple[list[int], list[int]]]) -> Batch:
        return collate([src for src, _ in items], [tgt for _, tgt in items], self._pad_id)

    def sample(self, tokens: int, seed: int = 1) -> Iterator[Batch | StateBatch]:
        """Batches of a uniform sample of the training split's pairs, the same at every call.

        Args:
            tokens: About how many target tokens the pairs have together; all of them, if there are fewer.
            seed: Of the sample.
        """
        split = self.splits["train"]
        lengths = split.lengths
        rows = list(range(len(lengths)))
        random.Random(seed).shuffle(rows)
        totals = accumulate(lengths[row] for row in rows)
        rows = rows[: next((number for number, total in enumerate(totals, 1) if total >= tokens), None)]
        collate: Any = split.collate if isinstance(split, StoredStates) else self._collate
        for batch in token_budget_batches([lengths[row] for row in rows], self.validation_max_tokens):
            yield collate([split[rows[item]] for item in batch])

    def train_dataloader(self) -> ResumableBatches:
        """Shuffled batches of the training split, of which a resumed run sees each once."""
        return ResumableBatches(self._loader("train", self.max_tokens, shuffle=True))

    def val_dataloader(self) -> DataLoader[Any]:
        """Batches of the validation split, shortest first."""
        return self._loader("validation", self.validation_max_tokens, shuffle=False)
