"""Build a datastore and its index: ``python build_index.py --config configs/demo/build.yaml``."""

import logging
import resource
import time

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.cli import run_script
from lightning_knnmt.datastore import Datastore, DatastoreConfig, build_datastore
from lightning_knnmt.index import IndexConfig, IndexReport, build_index

log = logging.getLogger("lightning_knnmt.build_index")


def build(backbone: Backbone, datastore: DatastoreConfig, index: IndexConfig = IndexConfig()) -> IndexReport:
    """Encode a parallel corpus and index its keys.

    Args:
        backbone: The model whose states become the keys.
        datastore: The corpus and where the datastore goes.
        index: The index over it.

    Returns:
        What the index is, and how evenly it is filled.
    """
    start = time.perf_counter()
    build_datastore(backbone, datastore)
    encoded = time.perf_counter()
    with Datastore(datastore.folder) as store:
        report = build_index(store, index)
    log.info("encode %.1f s, index %.1f s %s", encoded - start, time.perf_counter() - encoded, report.seconds)
    if report.imbalance_factor is not None:
        log.info(
            "%s: %d entries in %d lists, imbalance factor %.2f, homogeneity %.3f",
            report.factory,
            report.entries,
            report.nlist,
            report.imbalance_factor,
            report.homogeneity,
        )
    log.info("peak memory %.0f MB", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    return report


if __name__ == "__main__":
    run_script(build)
