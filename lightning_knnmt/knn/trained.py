"""Parts of a mixture whose parameters were trained for one model and one datastore, and are kept in a folder."""

import inspect
from abc import ABC
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_knnmt.backbone.provenance import Provenance
from lightning_knnmt.checks import check_number
from lightning_knnmt.knn.component import Component
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.step import Step
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.files import durable_file, file_sha256
from lightning_knnmt.storage.sealed import read_sealed, write_sealed

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.knn.memory import Memory

DESCRIPTION = "trained.json"  # class, options, model and datastore, with a checksum of itself
WEIGHTS = "trained.safetensors"


class TrainedPart(Component, nn.Module, ABC):
    """A combiner or gate whose constructor takes a `folder`: the options that it was trained with are read from there.

    Attributes:
        folder: Where it was read from; None: it was not trained.
        any_store: Whether another datastore of the same model than that of the training is taken.
        scale: What networks see distances or states in: the usual squared distance of a neighbor, or the usual
            squared norm of a query.
    """

    free_options: ClassVar[tuple[str, ...]] = ()  # that may be chosen anew after the training
    sees_states: ClassVar[bool] = False  # whether its networks see queries and keys, and not distances

    folder: Path | None
    any_store: bool
    scale: Tensor

    def _open(self, folder: Path | None, any_store: bool, **given: Any) -> dict[str, Any]:
        """The options of the network: those given, or those of the training.

        Raises:
            ValueError: There is no such part in the folder, it is damaged, or it was trained with other options.
        """
        self.folder, self.any_store = None if folder is None else Path(folder), any_store
        self.register_buffer("scale", torch.ones(()))
        if self.folder is None:
            self._description: dict[str, Any] | None = None
            return given
        self._description = _read(self.folder, type(self))
        trained = self._description["options"]
        if set(trained) | set(self.free_options) != set(given) | set(self.free_options):
            raise ValueError(f"{self.folder} was written by another version; train it again")
        usual = inspect.signature(type(self)).parameters
        for name, value in given.items():
            if name not in self.free_options and value not in (usual[name].default, trained[name]):
                raise ValueError(
                    f"{name} is {value!r}, but the {type(self).__name__} in {self.folder} was trained with "
                    f"{trained[name]!r}; leave it out"
                )
        return {name: given[name] if name in self.free_options else trained[name] for name in given}

    def _restore(self) -> None:
        """Take the trained parameters, once the network is there.

        Raises:
            ValueError: They are damaged.
        """
        if self.folder is None:
            return
        from safetensors.torch import load

        path = self.folder / WEIGHTS
        assert self._description is not None
        if not path.is_file() or file_sha256(path) != self._description["weights_sha256"]:
            raise ValueError(f"{path} is missing or damaged (its checksum is another); train it again")
        state = load(path.read_bytes())
        self.take_tables({name: state.pop(name) for name in list(state) if name in self._description["tables"]})
        try:
            self.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit the options in {self.folder / DESCRIPTION}: {error}") from error

    @cached_property
    def option_names(self) -> tuple[str, ...]:
        """The options of the constructor; of a trained part, those that may still be chosen."""
        names = tuple(name for name in inspect.signature(type(self)).parameters)
        if self.folder is not None:
            return tuple(name for name in names if name in ("folder", "any_store", *self.free_options))
        return tuple(name for name in names if name not in ("folder", "any_store"))

    def bind(self, model: "KeyedModel", memory: "Memory") -> None:
        """Refuse another model or another datastore than those of the training.

        Raises:
            ValueError: It was trained for others.
        """
        if self._description is None:
            return
        where = f"the {type(self).__name__} in {self.folder}"
        trained_for = Provenance(**self._description["provenance"])
        if differences := trained_for.differences(Provenance.of(model)):
            raise ValueError(
                f"{where} does not fit the model {model.name}: {'; '.join(differences)} (trained for, against given); "
                "use it with the model that it was trained for, or train another"
            )
        if memory.metric != self._description["metric"]:
            raise ValueError(
                f"{where} was trained for the metric {self._description['metric']!r}, but the index is searched by "
                f"{memory.metric!r}; train it again"
            )
        if not self.any_store and memory.fingerprint != self._description["store"]:
            raise ValueError(
                f"{where} was trained for another datastore ({self._description['store'][:12]}, this is "
                f"{memory.fingerprint[:12]}); train it again, or give it any_store: true, such as after an append"
            )

    def save(
        self, folder: Path, model: "KeyedModel", memory: "Memory", figures: Mapping[str, float] | None = None
    ) -> None:
        """Write parameters and description, the description last: without it nothing counts.

        Args:
            folder: Where to; it is made if it is not there.
            model: What it was trained for.
            memory: What it was trained for.
            figures: Of the training, for the reader of the description.

        Raises:
            DatastoreError: It could not be written.
        """
        from safetensors.torch import save

        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)
        tables = self.tables()
        state = {name: value.detach().cpu().contiguous() for name, value in (self.state_dict() | tables).items()}
        with durable_file(folder / WEIGHTS) as file:
            file.write(save(state))
        names = [name for name in inspect.signature(type(self)).parameters if name not in ("folder", "any_store")]
        content = {
            "class": _path(type(self)),
            "options": {name: getattr(self, name) for name in names},
            "provenance": asdict(Provenance.of(model)),
            "store": memory.fingerprint,
            "metric": memory.metric,
            "tables": sorted(tables),
            "weights_sha256": file_sha256(folder / WEIGHTS),
            "figures": dict(figures or {}),
        }
        write_sealed(folder / DESCRIPTION, content)

    def tables(self) -> dict[str, Tensor]:
        """What is saved beside the parameters, such as numbers for each entry of the datastore."""
        return {}

    def take_tables(self, tables: dict[str, Tensor]) -> None:
        """Take what was saved beside the parameters."""

    def set_scale(self, queries: Tensor, distances: Tensor) -> None:
        """Learn what is usual, before the training begins.

        Args:
            queries: Of R rows, shape (R, D).
            distances: Squared L2 distances of their neighbors, +inf where there is none, shape (R, K).
        """
        seen = queries.square().sum(1) if self.sees_states else distances
        telling = seen[seen.isfinite() & (seen != 0)].abs()
        usual = float(telling.median()) if len(telling) else 1.0
        check_number(above_zero=True, scale=usual)
        self.scale.fill_(usual)

    def training_neighbors(self, step: Step, neighbors: Neighbors, tokens: Tensor, progress: float) -> Neighbors:
        """The neighbors that a training step sees; here those that were found.

        Args:
            step: R rows.
            neighbors: Theirs.
            tokens: The references' tokens, shape (R,).
            progress: Share of the training that is done, from 0 to 1.
        """
        return neighbors


def _path(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _read(folder: Path, kind: type) -> dict[str, Any]:
    if not (folder / DESCRIPTION).exists():
        raise ValueError(
            f"folder is {folder}, which holds no {DESCRIPTION}, expected a folder that training has written"
        )
    try:
        content = read_sealed(folder / DESCRIPTION)
        found, expected = content["class"], _path(kind)
        if not {"metric", "options", "provenance", "store", "tables", "weights_sha256"} <= set(content):
            raise ValueError("something is missing in it")
    except (OSError, ValueError, KeyError, DatastoreError) as error:
        raise ValueError(f"{folder / DESCRIPTION} is damaged ({error}); train it again") from error
    if found != expected:
        raise ValueError(f"folder is {folder}, which holds a {found}, expected a {expected}")
    return content
