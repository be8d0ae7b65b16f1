"""How an index is built."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from lightning_knnmt.checks import check_at_least, check_one_of, shorten
from lightning_knnmt.metric import Metric
from lightning_knnmt.storage.layout import RESERVED

Layout = Literal["whole", "shards"]
Device = Literal["auto", "cpu", "gpu"]
TorchSearch = Literal["torch_keys", "torch_codes"]
SearchDevice = Literal[Device, TorchSearch]
LONGEST_FACTORY = 256  # characters; FAISS ends the process at a string of 400,000
MOST_LISTS = 1 << 24
HNSW_LISTS = 16384  # from which on a graph finds a query's lists faster than comparing it with all centroids


@dataclass(frozen=True)
class IndexConfig:
    """A FAISS index over the keys of a datastore.

    Attributes:
        factory: FAISS factory string, such as `IVF2048,PQ64x4fs`; `auto` chooses from N and D.
        metric: By what keys are near: `l2`, squared distance; `ip`, inner product; `cos`, inner product of keys and
            queries of unit norm. Keys that share a direction make lists uneven under `ip` with centroids of any norm
            (docs/dispersion.md).
        spherical: Whether the centroids of lists have unit norm, under `ip` and `cos`; None: they do.
        train_points: Keys that k-means and the codes are trained on, drawn uniformly from the whole datastore;
            None: 64 for each list, at least 65,536.
        seed: Seed of the sample.
        split_lists: Share of the inverted lists that come from splitting the longest ones, which k-means leaves behind
            where keys are clumped; 0: k-means alone.
        chunk: Keys added at a time.
        name: Files are called NAME.faiss and NAME.json, beside the shards.
        overwrite: Replace an index of that name that was built with other settings; otherwise that is an error.
        layout: `whole`: one file NAME.faiss. `shards`: entries in files NAME.part-00000.faiss, each of whole shards of
            the datastore, with the lists and codes trained once in NAME.faiss: building needs the memory of one part
            only, and several processes can search a part each.
        part_entries: Least number of entries in a part, but for the last: shards of the datastore are put together
            until they have as many. A build that is stopped continues from its last whole part; those of a whole index
            are merged in the end.
        device: Where lists and codes are trained and keys added: `auto` takes the GPUs that FAISS finds, `gpu` fails if
            there are none; an index that is there is kept wherever it was built.
    """

    factory: str = "auto"
    metric: Metric = "l2"
    spherical: bool | None = None
    train_points: int | None = None
    seed: int = 1
    split_lists: float = 0.0
    chunk: int = 65536
    name: str = "index"
    overwrite: bool = False
    layout: Layout = "whole"
    part_entries: int = 1 << 24
    device: Device = "auto"

    def __post_init__(self) -> None:
        check_at_least(1, train_points=self.train_points, chunk=self.chunk, part_entries=self.part_entries)
        check_at_least(0, seed=self.seed)
        check_factory(self.factory)
        check_one_of(get_args(Metric), metric=self.metric)
        if self.metric == "l2" and self.spherical:
            raise ValueError("spherical is True, expected none with l2, whose centroids are means; choose ip or cos")
        if not 0 <= self.split_lists < 1:
            raise ValueError(f"split_lists is {self.split_lists}, expected 0 or more and less than 1")
        check_one_of(get_args(Layout), layout=self.layout)
        check_one_of(get_args(Device), device=self.device)
        check_name(self.name)

    @property
    def unit_centroids(self) -> bool:
        """Whether the centroids of lists have unit norm."""
        return self.metric != "l2" and self.spherical is not False


def check_name(name: str) -> None:
    """Refuse what no index can be called.

    Raises:
        ValueError: It is no plain file name, or one that the datastore uses itself.
    """
    if not name or Path(name).name != name or "." in name:
        raise ValueError(f"name is {name!r}, expected a file name without folders and dots")
    if name in RESERVED:
        raise ValueError(f"name is {name!r}, expected another than those that the datastore uses itself")


def check_factory(factory: str) -> None:
    """Refuse a factory string with which FAISS would ask for more memory than there is, or end the process.

    Whether the rest of it makes sense, FAISS says when the keys' dimensions are known.

    Raises:
        ValueError: It is too long, or a number in it is none that an index can have.

    >>> check_factory("IVF0,Flat")
    Traceback (most recent call last):
    ...
    ValueError: factory is 'IVF0,Flat' with 0 in it, expected numbers of 1 to 16777216
    """
    if len(factory) > LONGEST_FACTORY:
        raise ValueError(f"factory is {shorten(factory, 40)!r}, expected {LONGEST_FACTORY} characters or fewer")
    for name, digits in re.findall(r"([A-Za-z]*)(\d+)", factory):
        least, most = (2, 1024) if name in ("HNSW", "NSG") else (1, MOST_LISTS)
        if not least <= int(digits) <= most:
            where = f" after {name}" if least > 1 else ""
            raise ValueError(
                f"factory is {factory!r} with {int(digits)} in it, expected numbers of {least} to {most}{where}"
            )


def default_train_points(nlist: int | None) -> int:
    """Keys to train on if nothing else is asked for.

    Args:
        nlist: Inverted lists; None if the index has none.
    """
    return max(65536, 64 * (nlist or 0))


def choose_nlist(entries: int) -> int:
    """A number of inverted lists for N entries: the power of two nearest to the square root of N.

    >>> choose_nlist(100_000)
    256
    """
    return 2 ** round(math.log2(math.sqrt(entries)))


def choose_factory(entries: int, key_size: int) -> str:
    """The factory string behind `auto`.

    Exact search up to 5,000 entries. Beyond, lists by the square root of N, codes that FAISS scans in registers, and
    the first candidates scored again from fp16 keys. Many lists (from about 134 million entries on) are themselves
    found through an HNSW graph.

    >>> choose_factory(100_000, 128)
    'IVF256,PQ64x4fs,Refine(SQfp16)'
    >>> choose_factory(1_000_000_000, 1024)
    'IVF32768_HNSW32,PQ64x4fs,Refine(SQfp16)'
    """
    if entries <= 5000:
        return "Flat"
    nlist = choose_nlist(entries)
    lists = f"{nlist}_HNSW32" if nlist >= HNSW_LISTS else str(nlist)
    sub_quantizers = next(m for m in (64, 32, 16, 8, 4, 2, 1) if key_size % m == 0 and m <= max(1, key_size // 2))
    return f"IVF{lists},PQ{sub_quantizers}x4fs,Refine(SQfp16)"
