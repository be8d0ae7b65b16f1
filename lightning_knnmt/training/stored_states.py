"""Training on stored states: what lies below the trained part has run once, and is read from a datastore."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.backbone.provenance import Provenance
from lightning_knnmt.datastore import Datastore

Item = tuple[Tensor, Tensor]


@dataclass
class StateBatch:
    """States of N target tokens that enter the last feed-forward layer, and the tokens.

    Attributes:
        states: Shape (N, D), float32.
        labels: Shape (N,).
    """

    states: Tensor
    labels: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "StateBatch":
        """The same batch on another device."""
        return StateBatch(*(part.to(device, non_blocking=non_blocking) for part in (self.states, self.labels)))

    def __len__(self) -> int:
        return len(self.labels)


def states_provenance(model: PretrainedModel) -> Provenance:
    """What a datastore of states comes from that this model, or one that was fine-tuned from it, can be trained on.

    Args:
        model: With `decoder_output` keys, before, during or after fine-tuning of what follows the states.
    """
    return replace(Provenance.of(model), key_type="ffn_residual", model_sha256=model.frozen_fingerprint)


class StoredStates(Dataset[Item]):
    """States and tokens of the pairs of a datastore, in the order of its corpus; they stay on the disk.

    Args:
        folder: A datastore that `build_index.py states` built.
        model: The model in training.

    Raises:
        DatastoreError: There is no whole datastore.
        ValueError: Its states are not those that enter the model's trained part.
    """

    def __init__(self, folder: Path, model: PretrainedModel) -> None:
        with Datastore(folder) as store:
            if differences := store.manifest.provenance.differences(states_provenance(model)):
                raise ValueError(
                    f"{folder} holds no states of the model {model.name}: {'; '.join(differences)} (datastore against "
                    "model); expected those that build_index.py states made with it"
                )
            self._states = store.mapped_keys()
            self._values = store.values
            none = np.empty(0, np.int64)
            numbers = [shard.file["numbers"][:][shard.kept] for shard in store.shards]
            starts = [shard.starts[:-1][shard.kept] for shard in store.shards]
            stops = [shard.starts[1:][shard.kept] for shard in store.shards]
            firsts = [shard.first for shard in store.shards]
        of_shard = np.repeat(np.arange(len(firsts)), [len(each) for each in numbers])
        order = np.argsort(np.concatenate([none, *numbers]), kind="stable")
        places = [of_shard, np.concatenate([none, *starts]), np.concatenate([none, *stops])]
        self._places = np.stack(places, axis=1)[order]  # [pair -> shard, its first entry there, entry after its last]
        self._firsts = firsts  # [shard -> its first entry]

    @property
    def lengths(self) -> list[int]:
        """Target tokens of each pair."""
        lengths: list[int] = (self._places[:, 2] - self._places[:, 1]).tolist()
        return lengths

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, item: int) -> Item:
        """States (T, D) and tokens (T,) of a pair."""
        shard, start, stop = self._places[item].tolist()
        first = self._firsts[shard]
        states = torch.from_numpy(np.array(self._states[shard][start:stop]))
        return states, torch.from_numpy(self._values[first + start : first + stop].astype(np.int64))

    @staticmethod
    def collate(items: Sequence[Item]) -> StateBatch:
        """The tokens of some pairs, one after the other."""
        states, labels = zip(*items, strict=True)
        return StateBatch(torch.cat(states), torch.cat(labels))
