"""Build a datastore and its index: ``python build_index.py --config configs/demo/build.yaml``.

``python build_index.py verify --folder runs/demo/store`` checks every file of one against its checksum.
"""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.cli import log_cut, peak_memory_mb, run_script
from lightning_knnmt.datastore import Datastore, DatastoreConfig, DatastoreError, build_datastore
from lightning_knnmt.datastore.verify import verify
from lightning_knnmt.evaluation.report import BUILD_FILE, read_build, write_json
from lightning_knnmt.index import IndexConfig, IndexReport, build_index, open_index

log = logging.getLogger("lightning_knnmt.build_index")


def build(backbone: Backbone, datastore: DatastoreConfig, index: IndexConfig = IndexConfig()) -> None:
    """Encode a parallel corpus and index its keys; what is already there and fits is kept.

    Beside the shards and the index, build.json says how long each stage took and how much memory it needed.

    Args:
        backbone: The model whose states become the keys, such as --backbone.model models/demo-de-en; --backbone.help
            lists its other options.
        datastore: The corpus and where the datastore goes.
        index: The index over it.
    """
    folder = datastore.folder
    record = read_build(folder)
    before = _stamp(folder / "manifest.json")
    start = time.perf_counter()
    manifest = build_datastore(backbone, datastore)
    if _stamp(folder / "manifest.json") != before:
        seconds = time.perf_counter() - start
        encode = {"seconds": round(seconds, 3), "peak_memory_mb": peak_memory_mb()}
        record = {"encode": encode | {"entries": manifest.entries, "pairs": manifest.pairs}, "indexes": {}}
        log.info("encode %.1f s, %.0f entries/s", seconds, manifest.entries / seconds)
    with Datastore(folder) as store:
        before = _stamp(folder / f"{index.name}.json")
        report = build_index(store, index)
        sizes = open_index(store, index.name).list_sizes()
    if _stamp(folder / f"{index.name}.json") != before:
        built: dict[str, Any] = {"seconds": report.seconds, "peak_memory_mb": peak_memory_mb()}
        record["indexes"][index.name] = built | ({} if sizes is None else {"list_sizes": _spread(sizes)})
        log.info("index %s", ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in report.seconds.items()))
    if record != read_build(folder):
        write_json(folder / BUILD_FILE, record)
    _log_report(report, None if sizes is None else _spread(sizes))
    log.info("peak memory %s MB", peak_memory_mb())
    log_cut(backbone)


def _stamp(path: Path) -> tuple[int, int] | None:
    """Changes whenever a file is replaced."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def _spread(sizes: np.ndarray) -> dict[str, int]:
    shortest, median, longest = (int(size) for size in np.quantile(sizes, (0, 0.5, 1)))
    return {"smallest": shortest, "median": median, "largest": longest, "empty": int((sizes == 0).sum())}


def _log_report(report: IndexReport, spread: dict[str, int] | None) -> None:
    if spread is None or report.imbalance_factor is None or report.homogeneity is None:
        log.info("%s: %d entries, no lists", report.factory, report.entries)
        return
    log.info("%s: %d entries in %d lists", report.factory, report.entries, report.nlist)
    log.info("list sizes: %s", ", ".join(f"{name} {size}" for name, size in spread.items()))
    log.info("imbalance factor %.2f, homogeneity %.3f", report.imbalance_factor, report.homogeneity)


def verify_datastore(folder: Path) -> None:
    """Check every file of a datastore and of its indexes against the checksums taken when they were written.

    Args:
        folder: The datastore.

    Raises:
        DatastoreError: Something is missing or was changed since.
    """
    problems = verify(folder)
    if problems:
        raise DatastoreError(f"{folder} is damaged: {'; '.join(map(str, problems))}; build it again")
    log.info("%s is whole", folder)


if __name__ == "__main__":
    if sys.argv[1:2] == ["verify"]:
        run_script(verify_datastore, sys.argv[2:])
    else:
        run_script(build)
