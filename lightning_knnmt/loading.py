"""A translator from a configuration, such as the translate.yaml that evaluate.py writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jsonargparse import ArgumentParser

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.checks import check_number
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.decoding.ensemble import EnsembleTranslator, check_whole_vocabulary
from lightning_knnmt.decoding.together import SharedTranslator
from lightning_knnmt.index.config import SearchDevice
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import Gate
from lightning_knnmt.knn.memory import Memory
from lightning_knnmt.knn.mixture import PlainModel
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.memory import DatastoreMemory, open_memory, open_pooled
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.ranks import Ranks


@dataclass(frozen=True)
class EnsembleMember:
    """A further model of an ensemble, with a datastore of its own.

    Attributes:
        backbone: The model, with the tokenizer of the first, and how it is loaded.
        datastore: Folder of a datastore built from it.
        index: Name of the datastore's index.
        knn: The usual search and mixture, where no class is chosen below.
        retriever: Where neighbors come from.
        combiner: How they are mixed in.
        gate: Which rows search.
        metric: That of the index, by which the settings were chosen; another is refused. None: any.
        weight: Of its probabilities, where those of the first model have 1; scaled to add up to 1.
    """

    backbone: BackboneConfig
    datastore: Path
    index: str = "index"
    knn: KnnSettings = KnnSettings()
    retriever: Retriever | None = None
    combiner: Combiner | None = None
    gate: Gate | None = None
    metric: Metric | None = None
    weight: float = 1.0

    def __post_init__(self) -> None:
        check_number(above_zero=True, weight=self.weight)

    @property
    def chosen(self) -> MixtureConfig:
        """Retriever, combiner and gate."""
        return MixtureConfig.of(self.knn, self.retriever, self.combiner, self.gate)


def open_translator(
    backbone: BackboneConfig,
    datastore: Path | None = None,
    index: str = "index",
    knn: KnnSettings = KnnSettings(),
    retriever: Retriever | None = None,
    combiner: Combiner | None = None,
    gate: Gate | None = None,
    decoding: Decoding = Decoding(),
    index_device: SearchDevice = "cpu",
    mmap: bool = False,
    translation_memory: CorpusFile | None = None,
    metric: Metric | None = None,
    checksums: bool | None = None,
    pooled_with: list[Path] | None = None,
    ensemble_with: list[EnsembleMember] | None = None,
    start: Callable[[KeyedModel], Ranks] | None = None,
) -> SharedTranslator:
    """Load a model, open its datastore, and put them together; the datastore stays open as long as the translator is.

    Args:
        backbone: The model.
        datastore: Folder of a datastore built from that model; None: the plain model.
        index: Name of the datastore's index.
        knn: The usual search and mixture, where no class is chosen below.
        retriever: Where neighbors come from.
        combiner: How they are mixed in.
        gate: Which rows search.
        decoding: Beam size, batch size and length.
        index_device: Where the index is searched.
        mmap: Leave the index's entries on the disk.
        translation_memory: Pairs as they stand, for a retriever that needs no stored keys; in place of a datastore.
        metric: That of the index, by which the settings were chosen; another is refused. None: any.
        checksums: Compare every byte of the datastore with its checksum first, as in `Datastore`.
        pooled_with: Folders of further datastores of the same model, searched together with the first.
        ensemble_with: Further models with datastores of their own, whose probabilities are averaged with these.
        start: Starts the processes that share the sentences and the index; None: this one alone.
    """
    chosen = MixtureConfig.of(knn, retriever, combiner, gate)
    check_memory(datastore, translation_memory, retriever)
    check_pooled(pooled_with, datastore, several=start is not None)
    check_ensemble(ensemble_with, decoding, several=start is not None)
    pairs = None if translation_memory is None else list(read_pairs(translation_memory))
    memory: DatastoreMemory | None = None
    if datastore is not None and start is None:
        # what is wrong with it is said before a model loads
        memory = open_memory(datastore, index, mmap, index_device, metric=metric, checksums=checksums)
    model = backbone.load()
    ranks = Ranks() if start is None else start(model)
    if datastore is not None and memory is None:
        memory = open_memory(datastore, index, mmap, index_device, ranks, metric, checksums)
    searched: Memory | None = memory if pairs is None else PairMemory(model, pairs)
    if memory is not None:
        searched = open_pooled(memory, pooled_with or [], index, mmap, index_device, checksums)
    mixture = PlainModel() if searched is None else chosen.open(model, searched)
    first = SharedTranslator(model, mixture, decoding, ranks, memory)
    if not ensemble_with:
        return first
    members = [first]
    for each in ensemble_with:
        own = open_memory(each.datastore, each.index, mmap, index_device, metric=each.metric, checksums=checksums)
        other = each.backbone.load().to(model.device)
        members.append(SharedTranslator(other, each.chosen.open(other, own), decoding, ranks, own))
    return EnsembleTranslator(members, [1.0, *(each.weight for each in ensemble_with)])


def check_memory(datastore: Path | None, translation_memory: CorpusFile | None, retriever: Retriever | None) -> None:
    """Refuse two memories, and a translation memory with the retriever that searches stored keys.

    Raises:
        ValueError: There are two, or no retriever is chosen by its class.
    """
    if translation_memory is None:
        return
    if datastore is not None:
        raise ValueError(
            f"datastore is {datastore} and translation_memory is {translation_memory.path}, expected one of them"
        )
    if retriever is None:
        raise ValueError(
            f"translation_memory is {translation_memory.path}, which has no keys to search, and no retriever is given; "
            "expected one that needs none: class_path: lightning_knnmt.knn.retrievers.per_sentence.PerSentence"
        )


def check_pooled(pooled_with: list[Path] | None, datastore: Path | None, several: bool) -> None:
    """Refuse further datastores without a first one, and with several processes.

    Raises:
        ValueError: They are given so.
    """
    if pooled_with and datastore is None:
        raise ValueError("pooled_with is given without a datastore, expected the first of them in datastore")
    if pooled_with and several:
        raise ValueError("pooled_with is given, which one process searches alone, but processes is more than one")


def check_ensemble(ensemble_with: Sequence[EnsembleMember] | None, decoding: Decoding, several: bool) -> None:
    """Refuse an ensemble with several processes, and with a part of the vocabulary.

    Raises:
        ValueError: It is given so.
    """
    if ensemble_with and several:
        raise ValueError("ensemble_with is given, which one process decodes alone, but processes is more than one")
    if ensemble_with:
        check_whole_vocabulary(decoding)


def load_translator(path: Path | str) -> Translator:
    """The translator of a configuration file with the options of `translate.py`.

    Args:
        path: A file such as the translate.yaml that evaluate.py writes; paths in it count from the current folder.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has an option that is unknown or does not fit.
        DatastoreError: The datastore is missing, damaged, or of another model.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path is {path}, which is no file; expected a configuration such as translate.yaml")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(open_translator, skip={"start"})
    try:
        options = parser.instantiate_classes(parser.parse_path(str(path)))
    except Exception as error:
        raise ValueError(f"{path} is no configuration of translate.py: {error}") from error
    return open_translator(**options)
