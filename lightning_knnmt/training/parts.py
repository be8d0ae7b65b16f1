"""LightningModules of the parts that are trained for a model and its datastore: combiners and gates."""

from abc import ABC, abstractmethod
from pathlib import Path

import lightning as L
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_number
from lightning_knnmt.knn.combiners.adaptive import AdaptiveCombiner
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.combiners.kernel import KernelCombiner
from lightning_knnmt.knn.combiners.robust import RobustCombiner
from lightning_knnmt.knn.gates import LearnedGate
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.knn.trained import TrainedPart
from lightning_knnmt.memory import open_memory
from lightning_knnmt.training.steps import SearchedSteps

MOST_GAIN = 5.0  # nats of one token, beyond which a gate learns nothing more

__all__ = ["AdaptiveCombiner", "CombinerModule", "FixedCombiner", "GateModule", "KernelCombiner", "RobustCombiner"]


class PartModule(L.LightningModule, ABC):
    """A part in training, with the model and the datastore that it is trained for, neither of which changes.

    Args:
        part: What is trained.
        backbone: The model.
        datastore: Folder of a datastore built from it.
        retriever: Where neighbors come from.
        index: Name of the datastore's index.
        lr: Learning rate of Adam.
        weight_decay: Its weight decay.
    """

    def __init__(
        self,
        part: TrainedPart,
        backbone: BackboneConfig,
        datastore: Path,
        retriever: Retriever,
        index: str,
        lr: float,
        weight_decay: float,
    ) -> None:
        super().__init__()
        check_number(above_zero=True, lr=lr)
        check_number(weight_decay=weight_decay)
        if part.folder is not None:
            raise ValueError(
                f"folder is {part.folder}, expected none for a {type(part).__name__} that is to be trained"
            )
        self.part, self.retriever, self.lr, self.weight_decay = part, retriever, lr, weight_decay
        self.memory = open_memory(datastore, index)
        model = backbone.load()
        self.memory.check(model)
        part.bind(model, self.memory)
        self._model = [model]  # out of sight of Lightning: it is not trained, moved or saved

    @property
    def model(self) -> KeyedModel:
        """The model, which is not trained."""
        return self._model[0]

    @abstractmethod
    def loss(self, steps: SearchedSteps) -> Tensor:
        """The loss of R steps."""

    @property
    def progress(self) -> float:
        """Share of the training that is done, from 0 to 1."""
        return min(1.0, self.global_step / max(1, int(self.trainer.estimated_stepping_batches)))

    def training_step(self, steps: SearchedSteps, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        loss = self.loss(steps)
        self.log("train/loss", loss.detach(), batch_size=len(steps), prog_bar=True)
        return loss

    def validation_step(self, steps: SearchedSteps, batch_idx: int) -> None:
        """Log losses in nats per token: of the mixture, and of the model alone."""
        self.log("val/loss", self.loss(steps), batch_size=len(steps), prog_bar=True)
        self.log("val/plain_loss", -steps.plain_log_probs.mean(), batch_size=len(steps))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.AdamW(self.part.parameters(), lr=self.lr, weight_decay=self.weight_decay)

    def save(self, folder: Path) -> None:
        """Write the part, with the figures of the latest validation."""
        figures = {name: float(value) for name, value in self.trainer.callback_metrics.items()}
        self.part.save(folder, self._model[0], self.memory, figures)


class CombinerModule(PartModule):
    """A combiner is trained to give references a high likelihood: the loss is −log p, in nats per target token.

    Args:
        combiner: What is trained, such as an `AdaptiveCombiner`.
        backbone: The model, such as --model.backbone.model data/models/firefox-en-pt, and how it is loaded.
        datastore: Folder of a datastore built from that model.
        retriever: Where neighbors come from; None: the whole store, as many as the combiner looks at.
        index: Name of the datastore's index.
        lr: Learning rate of Adam.
        weight_decay: Its weight decay.

    Raises:
        ValueError: An option is out of range, or the parts do not fit.
        DatastoreError: The datastore is missing, damaged, or of another model.
    """

    def __init__(
        self,
        combiner: Combiner,
        backbone: BackboneConfig,
        datastore: Path,
        retriever: Retriever | None = None,
        index: str = "index",
        lr: float = 3e-3,
        weight_decay: float = 0.0,
    ) -> None:
        if not isinstance(combiner, TrainedPart):
            raise ValueError(f"combiner is a {type(combiner).__name__}, which has nothing to train, expected another")
        found = WholeStore(k=combiner.options.get("k", 16)) if retriever is None else retriever
        super().__init__(combiner, backbone, datastore, found, index, lr, weight_decay)
        self.combiner: Combiner = combiner

    def loss(self, steps: SearchedSteps) -> Tensor:
        """−log p of the references' tokens, the mean."""
        neighbors = steps.neighbors
        if self.training:
            neighbors = self.part.training_neighbors(steps.step, neighbors, steps.tokens, self.progress)
        return -self.combiner.token_log_probs(steps.step, neighbors, steps.tokens).mean()


class GateModule(PartModule):
    """A gate is trained to predict how many nats neighbors add to the reference's log-likelihood: squared error.

    Args:
        gate: What is trained.
        combiner: How neighbors are mixed in; a trained one is given by its folder, and stays as it is.
        backbone: The model, such as --model.backbone.model data/models/firefox-en-pt, and how it is loaded.
        datastore: Folder of a datastore built from that model.
        retriever: Where neighbors come from; None: the 16 nearest of the whole store.
        index: Name of the datastore's index.
        lr: Learning rate of Adam.
        weight_decay: Its weight decay.

    Raises:
        ValueError: An option is out of range, or the parts do not fit.
        DatastoreError: The datastore is missing, damaged, or of another model.
    """

    def __init__(
        self,
        gate: LearnedGate,
        combiner: Combiner,
        backbone: BackboneConfig,
        datastore: Path,
        retriever: Retriever | None = None,
        index: str = "index",
        lr: float = 1e-3,
        weight_decay: float = 0.01,
    ) -> None:
        found = WholeStore() if retriever is None else retriever
        super().__init__(gate, backbone, datastore, found, index, lr, weight_decay)
        combiner.bind(self._model[0], self.memory)
        self.gate: LearnedGate = gate
        self._combiner = [combiner.requires_grad_(False).eval()]

    def gains(self, steps: SearchedSteps) -> Tensor:
        """What neighbors add to the log-likelihood of each token, in nats, shape (R,)."""
        combiner = self._combiner[0].to(self.device)
        return combiner.token_log_probs(steps.step, steps.neighbors, steps.tokens) - steps.plain_log_probs

    def loss(self, steps: SearchedSteps) -> Tensor:
        """Mean squared error of the expected gain."""
        return F.mse_loss(self.gate.expected_gain(steps.step), self.gains(steps).clamp(-MOST_GAIN, MOST_GAIN))

    def validation_step(self, steps: SearchedSteps, batch_idx: int) -> None:
        """Log also what is gained by always searching, and by searching where a gain is expected, and how often."""
        super().validation_step(steps, batch_idx)
        gains, opened = self.gains(steps), self.gate(steps.step)
        self.log("val/gain_of_all", gains.mean(), batch_size=len(steps))
        self.log("val/gain", (gains * opened).mean(), batch_size=len(steps))
        self.log("val/searched", opened.float().mean(), batch_size=len(steps))
