"""How a datastore and its sentence indexes are built."""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lightning_knnmt.checks import check_at_least, check_one_of, check_share
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.index.config import check_name
from lightning_knnmt.sentences.report import LIKENESSES, Likeness


class Destination(Protocol):
    """Where a datastore goes, and whether another one there is replaced."""

    @property
    def folder(self) -> Path:
        """Where it goes."""
        ...

    @property
    def overwrite(self) -> bool:
        """Whether another one is replaced."""
        ...


@dataclass(frozen=True)
class DatastoreConfig:
    """How a datastore is built.

    Attributes:
        folder: Where it goes.
        corpus: The parallel corpus; `train.jsonl` of `prepare_data.py`, or any format that the readers know.
        max_tokens: Most tokens of a batch on either side, padding counted.
        max_padding: Largest share of a shard's batches that may be padding; less makes more and smaller batches.
        shard_pairs: Pairs of a shard, of which the sentences of two are held in memory; fewer where texts are long.
        overwrite: Replace a datastore that was built from something else; otherwise that is an error.
    """

    folder: Path
    corpus: CorpusFile
    max_tokens: int = 8192
    max_padding: float = 0.04
    shard_pairs: int = 1 << 14
    overwrite: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "folder", Path(self.folder))
        check_at_least(1, max_tokens=self.max_tokens, shard_pairs=self.shard_pairs)
        check_share(max_padding=self.max_padding)


@dataclass(frozen=True)
class RekeyConfig:
    """Which states become keys, and where these go.

    Attributes:
        states: Folder of the states, which `build_index.py states` wrote.
        folder: Where the datastore goes.
        overwrite: Replace a datastore that was built from something else; otherwise that is an error.
    """

    states: Path
    folder: Path
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("states", "folder"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        if self.states.resolve() == self.folder.resolve():
            raise ValueError(f"folder is {self.folder}, where the states are, expected another")


@dataclass(frozen=True)
class SentencesConfig:
    """How stored sentences are compared.

    Attributes:
        by: `bm25` or `tf_idf`: by their words; `states`: by averaged encoder states of the translation model;
            `encoder`: by another encoder.
        name: Files are called NAME.sentences.safetensors and .json, beside the shards.
        encoder: Hub name or folder of that other encoder.
        overwrite: Replace a sentence index of that name that was made otherwise.
    """

    by: Likeness = "bm25"
    name: str = "sentences"
    encoder: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_one_of(LIKENESSES, by=self.by)
        check_name(self.name)
        if (self.encoder is not None) != (self.by == "encoder"):
            raise ValueError(f"encoder is {self.encoder!r} and by is {self.by!r}, expected a name for by: encoder only")
