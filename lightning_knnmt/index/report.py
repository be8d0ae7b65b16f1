"""What is said of a built index, beside it."""

from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_knnmt.datastore import DatastoreError
from lightning_knnmt.datastore.manifest import check_types
from lightning_knnmt.datastore.sealed import read_sealed, write_sealed


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

    def __post_init__(self) -> None:
        check_types(self)

    def save(self, path: Path) -> None:
        """Write NAME.json, whole or not at all.

        Raises:
            DatastoreError: It could not be written.
        """
        write_sealed(path, asdict(self))

    @classmethod
    def load(cls, path: Path) -> "IndexReport":
        """Read NAME.json.

        Raises:
            DatastoreError: It is damaged.
        """
        try:
            return cls(**read_sealed(path))
        except (ValueError, TypeError) as error:
            raise DatastoreError(f"{path} is damaged ({error}); build the index again") from error
