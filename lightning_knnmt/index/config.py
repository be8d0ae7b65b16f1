"""How an index is built."""

import math
from dataclasses import dataclass
from pathlib import Path

RESERVED = ("manifest", "building", "build")  # whose .json the datastore has


@dataclass(frozen=True)
class IndexConfig:
    """A FAISS index over the keys of a datastore.

    Attributes:
        factory: FAISS factory string, such as `IVF2048,PQ64x4fs`; `auto` chooses from N and D.
        train_points: Keys that k-means and the codes are trained on, drawn uniformly from the whole datastore;
            None: 64 for each list, at least 65,536.
        seed: Seed of the sample.
        chunk: Keys added at a time.
        name: Files are called NAME.faiss and NAME.json, beside the shards.
        overwrite: Replace an index of that name that was built with other settings; otherwise that is an error.
    """

    factory: str = "auto"
    train_points: int | None = None
    seed: int = 1
    chunk: int = 65536
    name: str = "index"
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.train_points is not None and self.train_points < 1:
            raise ValueError(f"train_points is {self.train_points}, expected 1 or more")
        if self.chunk < 1:
            raise ValueError(f"chunk is {self.chunk}, expected 1 or more")
        if not self.name or Path(self.name).name != self.name or "." in self.name:
            raise ValueError(f"name is {self.name!r}, expected a file name without folders and dots")
        if self.name in RESERVED:
            raise ValueError(f"name is {self.name!r}, expected another than those that the datastore uses itself")


def choose_nlist(entries: int) -> int:
    """A number of inverted lists for N entries: the power of two nearest to the square root of N.

    >>> choose_nlist(100_000)
    256
    """
    return 2 ** round(math.log2(math.sqrt(entries)))


def choose_factory(entries: int, key_size: int) -> str:
    """The factory string behind `auto`.

    Exact search up to 5,000 entries. Beyond, lists by the square root of N, codes that FAISS scans in registers, and
    the first candidates scored again from fp16 keys.

    >>> choose_factory(100_000, 128)
    'IVF256,PQ64x4fs,Refine(SQfp16)'
    """
    if entries <= 5000:
        return "Flat"
    lists = choose_nlist(entries)
    sub_quantizers = next(m for m in (64, 32, 16, 8, 4, 2, 1) if key_size % m == 0 and m <= max(1, key_size // 2))
    return f"IVF{lists},PQ{sub_quantizers}x4fs,Refine(SQfp16)"
