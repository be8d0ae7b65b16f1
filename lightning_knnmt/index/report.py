"""The description of a built index: its settings, its checksums and how evenly it is filled, in NAME.json beside it."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lightning_knnmt.checks import check_types
from lightning_knnmt.index.config import IndexConfig, Layout, default_train_points
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.artifact import Artifact
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import part_file
from lightning_knnmt.storage.sealed import read_sealed


@dataclass(frozen=True)
class IndexPart:
    """A file with some of an index's entries; those of the next part follow.

    Attributes:
        entries: Entries in it.
        faiss_sha256: Its checksum.
    """

    entries: int
    faiss_sha256: str

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True)
class IndexReport:
    """What an index is, and how evenly it is filled; the contents of NAME.json, without which NAME.faiss is not whole.

    Attributes:
        factory: FAISS factory string.
        entries: Entries in it.
        key_size: D.
        nlist: Inverted lists; None if the index has none.
        train_points: Keys that it was trained on.
        seed: Seed of that sample.
        imbalance_factor: 1 is perfect; None without lists.
        homogeneity: Of target tokens over lists; None without lists.
        datastore_sha256: Fingerprint of the datastore's manifest.
        faiss_sha256: Checksum of NAME.faiss.
        seconds: Time of each stage of building.
        split_lists: Share of the lists that come from splitting the longest.
        metric: By what entries are near.
        unit_centroids: Whether the centroids of lists have unit norm.
        parts: Where the entries are if not in NAME.faiss, which then holds what was trained only.
        added: Entries that were appended after training.
        trained_imbalance_factor: What the imbalance factor was before; None if nothing was appended, or without lists.
    """

    factory: str
    entries: int
    key_size: int
    nlist: int | None
    train_points: int
    seed: int
    imbalance_factor: float | None
    homogeneity: float | None
    datastore_sha256: str
    faiss_sha256: str
    seconds: dict[str, float]
    split_lists: float = 0.0
    parts: tuple[IndexPart, ...] = ()
    added: int = 0
    trained_imbalance_factor: float | None = None
    metric: Metric = "l2"
    unit_centroids: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if self.parts and sum(part.entries for part in self.parts) != self.entries:
            raise ValueError(f"its parts have {sum(part.entries for part in self.parts)} of {self.entries} entries")
        if not 0 <= self.added <= self.entries:
            raise ValueError(f"added is {self.added}, expected 0 to {self.entries}")

    @property
    def layout(self) -> Layout:
        """Whether the entries are in one file or in parts."""
        return "shards" if self.parts else "whole"

    @property
    def trained_entries(self) -> int:
        """Entries that there were when it was trained."""
        return self.entries - self.added

    def config(self, name: str) -> IndexConfig:
        """Settings that make it again.

        Args:
            name: What it is called.
        """
        every_key = self.train_points == self.trained_entries <= default_train_points(self.nlist)
        points = None if every_key else self.train_points  # there may be more keys by now
        config = IndexConfig(
            factory=self.factory,
            metric=self.metric,
            spherical=None if self.metric == "l2" else self.unit_centroids,
            train_points=points,
            seed=self.seed,
            split_lists=self.split_lists,
            name=name,
            layout=self.layout,
            overwrite=True,
        )
        return replace(config, part_entries=max(1, self.parts[0].entries)) if self.parts else config

    def damaged(self, path: Path) -> Path | None:
        """The first file that is not as it was written.

        Args:
            path: NAME.faiss.
        """
        checksums = self.checksums(path).items()
        return next((file for file, sha256 in checksums if not Artifact(file).is_whole(sha256)), None)

    def checksums(self, path: Path) -> dict[Path, str]:
        """SHA-256 of each of its files.

        Args:
            path: NAME.faiss.
        """
        parts = {part_file(path.parent, path.stem, number): part.faiss_sha256 for number, part in enumerate(self.parts)}
        return {path: self.faiss_sha256, **parts}

    def save(self, path: Path) -> None:
        """Write the description, whole or not at all.

        Args:
            path: NAME.faiss.

        Raises:
            DatastoreError: It could not be written.
        """
        Artifact(path).describe(asdict(self), self.faiss_sha256)

    @classmethod
    def load(cls, path: Path) -> "IndexReport":
        """Read NAME.json.

        Raises:
            DatastoreError: It is damaged.
        """
        try:
            content = read_sealed(path)
            content["parts"] = tuple(IndexPart(**part) for part in content.get("parts", ()))
            return cls(**content)
        except (ValueError, TypeError) as error:
            raise DatastoreError(f"{path} is damaged ({error}); build the index again") from error
