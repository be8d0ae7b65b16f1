"""Gate, retriever and combiner in one: what decoding, tuning, explaining and training combiners call."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import Gate, OpenGate
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.step import Step

if TYPE_CHECKING:
    from lightning_knnmt.backbone.batch import Batch
    from lightning_knnmt.backbone.keyed_model import KeyedModel
    from lightning_knnmt.timing import Spans

Widen = Callable[[Step, Neighbors], tuple[Step, Neighbors]]


class Mixture:
    """p = λ p_kNN + (1 − λ) p_NMT: the gate says which rows search, the retriever what they find, the combiner λ.

    Args:
        model: Whose prediction is changed.
        memory: What is searched.
        retriever: Where neighbors come from.
        combiner: How they are mixed in.
        gate: Which rows search; None: all.

    Raises:
        ValueError: A part does not fit the model or the memory.
    """

    def __init__(
        self,
        model: "KeyedModel",
        memory: Memory,
        retriever: Retriever,
        combiner: Combiner,
        gate: Gate | None = None,
    ) -> None:
        memory.check(model)
        self.model, self.memory = model, memory
        self.retriever, self.combiner, self.gate = retriever, combiner, OpenGate() if gate is None else gate
        self.combiner.to(model.device).eval()
        self.gate.to(model.device).eval()
        for part in self.parts:
            part.bind(model, memory)

    @property
    def parts(self) -> tuple[Retriever, Combiner, Gate]:
        """Retriever, combiner and gate."""
        return self.retriever, self.combiner, self.gate

    @property
    def changes_nothing(self) -> bool:
        """Whether this is the plain model, and nothing need be searched."""
        return self.combiner.changes_nothing

    @property
    def prepares(self) -> bool:
        """Whether `begin` prepares for a batch, so that all of its sentences are to be decoded together."""
        return type(self.retriever).begin is not Retriever.begin

    @property
    def follows(self) -> bool:
        """Whether there is to be one row a text, as `Retriever` says."""
        return self.retriever.follows

    def begin(self, batch: "Batch") -> None:
        """Prepare for B sentences."""
        self.retriever.begin(batch)

    def neighbors(self, step: Step, spans: "Spans | None" = None) -> Neighbors:
        """Neighbors of R rows; a row that the gate keeps from searching has none.

        Args:
            step: R rows.
            spans: Receives the time of `gate` and `search`, counted in rows; rows of it that the retriever did without
                a search are counted as `followed`.
        """
        if isinstance(self.gate, OpenGate):
            return self._found(step, spans)
        with _span(spans, "gate", len(step)):
            searched = self.gate(step)
            asked = step.rows(searched)
        return self._found(asked, spans).spread(searched)

    def _found(self, step: Step, spans: "Spans | None") -> Neighbors:
        with _span(spans, "search", len(step)):
            found = self.retriever(step)
        if spans is not None and self.retriever.followed:
            spans.counts["search"] -= self.retriever.followed
            spans.counts["followed"] += self.retriever.followed
        return found

    def __call__(self, step: Step, spans: "Spans | None" = None) -> Tensor:
        """Logits of the mixture, shape (R, V).

        Args:
            step: R rows.
            spans: Receives the time of `gate`, `search` and `mix`, counted in rows.
        """
        return self.mixed(step, spans).logits

    def mixed(self, step: Step, spans: "Spans | None" = None, widen: Widen | None = None) -> Step:
        """The same rows with the logits of the mixture and their normaliser.

        Args:
            step: R rows.
            spans: Receives the time of `gate`, `search` and `mix`, counted in rows.
            widen: Called between search and mixing where the logits stand for a part of the vocabulary: takes the step
                and its neighbors, and gives both with a logit for every retrieved token, and columns for token ids.
        """
        neighbors = self.neighbors(step, spans)
        with _span(spans, "mix", len(step)):
            if widen is not None:
                step, neighbors = widen(step, neighbors)
            return self.combiner.mix(step, neighbors)


class PlainModel:
    """The mixture without neighbors: the model's own prediction."""

    changes_nothing = True
    prepares = False
    follows = False

    def begin(self, batch: "Batch") -> None:
        """Nothing to prepare."""

    def __call__(self, step: Step, spans: "Spans | None" = None) -> Tensor:
        """The model's logits, shape (R, V)."""
        return step.logits

    def mixed(self, step: Step, spans: "Spans | None" = None, widen: Widen | None = None) -> Step:
        """The step as it is."""
        return step


def _span(spans: "Spans | None", name: str, count: int) -> Any:
    return nullcontext() if spans is None else spans.span(name, count)
