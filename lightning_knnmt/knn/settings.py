"""The short form of the usual mixture: whole store, fixed λ."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.gates import Gate, OpenGate
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.retrievers.whole_store import WholeStore

if TYPE_CHECKING:
    from lightning_knnmt.backbone.keyed_model import KeyedModel


@dataclass(frozen=True)
class KnnSettings:
    """How neighbors are searched and mixed in, where no retriever, combiner or gate is chosen by its class.

    Attributes:
        k: Neighbors of each query.
        lambda_: λ, the neighbors' share, in [0, 1].
        temperature: T, in units of distance: squared L2, or similarity.
        nprobe: Inverted lists that each query scans.
        rescore: Candidates of each query whose distances the stored keys decide exactly, k or more; 0: the index does.
        ef_search: Nodes that a search through an HNSW graph keeps in view; None: as the index was built.
    """

    k: int = 16
    lambda_: float = 0.5
    temperature: float = 10.0
    nprobe: int = 8
    rescore: int = 0
    ef_search: int | None = None

    def __post_init__(self) -> None:
        for name in ("retriever", "combiner"):  # which check their options
            getattr(self, name)

    def open(self, model: "KeyedModel", memory: Memory) -> Mixture:
        """The mixture of a model and a memory.

        Raises:
            ValueError: They do not fit.
        """
        return Mixture(model, memory, self.retriever, self.combiner)

    @property
    def retriever(self) -> WholeStore:
        """Search in the whole store."""
        return WholeStore(self.k, self.nprobe, self.rescore, self.ef_search)

    @property
    def combiner(self) -> FixedCombiner:
        """The same λ and T at every step."""
        return FixedCombiner(self.lambda_, self.temperature)


@dataclass(frozen=True)
class MixtureConfig:
    """A retriever, a combiner and a gate that are not bound to a model yet.

    Attributes:
        retriever: Where neighbors come from.
        combiner: How they are mixed in.
        gate: Which rows search.

    >>> MixtureConfig.of(KnnSettings(k=4)).with_options(lambda_=0.7).settings
    KnnSettings(k=4, lambda_=0.7, temperature=10.0, nprobe=8, rescore=0, ef_search=None)
    """

    retriever: Retriever
    combiner: Combiner
    gate: Gate

    @classmethod
    def of(
        cls,
        knn: KnnSettings = KnnSettings(),
        retriever: Retriever | None = None,
        combiner: Combiner | None = None,
        gate: Gate | None = None,
    ) -> "MixtureConfig":
        """What was chosen by class, and the short form for the rest."""
        return cls(
            knn.retriever if retriever is None else retriever,
            knn.combiner if combiner is None else combiner,
            OpenGate() if gate is None else gate,
        )

    def open(self, model: "KeyedModel", memory: Memory) -> Mixture:
        """The mixture of a model and a memory; the parts themselves stay unbound.

        Raises:
            ValueError: They do not fit.
        """
        parts = (part.with_options() for part in self.parts)
        return Mixture(model, memory, *parts)  # type: ignore[arg-type]

    @property
    def settings(self) -> KnnSettings | None:
        """The short form; None if another class was chosen."""
        if (type(self.retriever), type(self.combiner), type(self.gate)) != (WholeStore, FixedCombiner, OpenGate):
            return None
        return KnnSettings(**self.retriever.options, **self.combiner.options)

    @property
    def parts(self) -> tuple[Retriever, Combiner, Gate]:
        """Retriever, combiner and gate."""
        return self.retriever, self.combiner, self.gate

    def with_options(self, **changed: Any) -> "MixtureConfig":
        """The same classes, each with those of some options that it has.

        Raises:
            ValueError: No part has such an option.
        """
        if unknown := [name for name in changed if not any(name in part.option_names for part in self.parts)]:
            raise ValueError(
                f"{', '.join(unknown)} is no option of {', '.join(type(part).__name__ for part in self.parts)}"
            )
        return MixtureConfig(
            *(part.with_options(**{n: v for n, v in changed.items() if n in part.option_names}) for part in self.parts)  # type: ignore[arg-type]
        )

    @property
    def configuration(self) -> dict[str, Any]:
        """As a configuration file has it: the short form, or each part by its class."""
        if (settings := self.settings) is not None:
            return {"knn": asdict(settings)}
        names = ("retriever", "combiner", "gate")
        return {name: part.configuration for name, part in zip(names, self.parts, strict=True)}

    @property
    def plain(self) -> dict[str, Any]:
        """As plain values: the options of the short form, or each part by its class."""
        return self.configuration.get("knn", self.configuration)

    def __str__(self) -> str:
        return str(self.settings or " + ".join(map(repr, self.parts)))
