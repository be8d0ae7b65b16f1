"""The settings of a kNN search, and everything that it takes to translate with them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.index.config import Device
from lightning_knnmt.index.opening import open_index, read_report
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.retrievers.whole_store import DatastoreRetriever, check_rescore
from lightning_knnmt.storage.snapshot import open_together


@dataclass(frozen=True)
class KnnSettings:
    """How neighbors are searched and mixed in.

    Attributes:
        k: Neighbors of each query.
        lambda_: λ, the neighbors' share, in [0, 1].
        temperature: T, in units of squared distance.
        nprobe: Inverted lists that each query scans.
        rescore: Candidates of each query whose distances the stored keys decide exactly, k or more; 0: the index does.
    """

    k: int = 16
    lambda_: float = 0.5
    temperature: float = 10.0
    nprobe: int = 8
    rescore: int = 0

    def __post_init__(self) -> None:
        for name in ("k", "nprobe"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 or more")
        check_rescore(self.rescore, self.k)
        FixedCombiner(self.lambda_, self.temperature)


class KnnSearch:
    """A backbone with a datastore that was built from it.

    Args:
        backbone: The model.
        datastore: Its datastore.
        index: Name of the datastore's index.
        mmap: Leave the index's entries on the disk, for one that is larger than memory.
        device: Where the index is searched, as in `open_index`.

    Raises:
        DatastoreError: The datastore was built with another model, tokenizer, key type or language.
        ValueError: FAISS has no GPU, or no GPU version of the index, where one is asked for.
    """

    def __init__(
        self,
        backbone: KeyedModel,
        datastore: Datastore,
        index: str = "index",
        mmap: bool = False,
        device: Device = "cpu",
    ) -> None:
        datastore.check(backbone)
        self.backbone, self.datastore = backbone, datastore
        self.index_name = index
        self.index = open_index(datastore, index, mmap, device)
        self.report = read_report(datastore, index)

    def retriever(self, k: int, nprobe: int, rescore: int = 0) -> DatastoreRetriever:
        """A retriever of k neighbors out of nprobe lists, or out of so many candidates."""
        return DatastoreRetriever(self.datastore, self.index, k, nprobe, rescore)

    def translator(self, settings: KnnSettings, decoding: Decoding) -> Translator:
        """A translator with neighbors."""
        combiner = FixedCombiner(settings.lambda_, settings.temperature)
        retriever = self.retriever(settings.k, settings.nprobe, settings.rescore)
        return Translator(self.backbone, decoding, retriever, combiner)


@contextmanager
def open_search(
    backbone: KeyedModel, datastore: Path, index: str = "index", mmap: bool = False, device: Device = "cpu"
) -> Iterator[KnnSearch]:
    """Open a datastore and its index for as long as the block runs, though others change them."""

    def attempt() -> KnnSearch:
        store = Datastore(datastore)
        try:
            return KnnSearch(backbone, store, index, mmap, device)
        except BaseException:
            store.close()
            raise

    search = open_together(datastore, attempt)
    with search.datastore:
        yield search
