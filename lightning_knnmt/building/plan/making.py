"""From a configuration to a plan."""

import logging
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.config import DatastoreConfig
from lightning_knnmt.building.plan.encoding import measure_encoding
from lightning_knnmt.building.plan.indexing import measure_index
from lightning_knnmt.building.plan.prediction import Plan, Size, predict
from lightning_knnmt.checks import check_at_least
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.factory import make_index
from lightning_knnmt.index.gpu import find_gpus
from lightning_knnmt.index.layers import find_ivf
from lightning_knnmt.index.training import Training

log = logging.getLogger(__name__)


def make_plan(
    model: KeyedModel,
    datastore: DatastoreConfig,
    index: IndexConfig = IndexConfig(),
    entries: int | None = None,
    machines: int = 1,
    sample_pairs: int = 2000,
) -> Plan:
    """Measure rates, and predict from them; arguments and errors as those of `build_index.py plan`."""
    check_at_least(1, entries=entries, machines=machines, sample_pairs=sample_pairs)
    find_gpus(index.device)  # what is wrong shows before anything is measured
    known = None if index.factory == "auto" else make_index(index.factory, model.key_size, index.metric)
    if known is not None and find_ivf(known) is not None and not re.search(r"IVF\d", index.factory):
        raise ValueError(f"factory is {index.factory}, expected one whose lists are written IVF… to plan it")
    with _scratch_folder(datastore.folder) as folder:
        log.info("measuring the encoding of %s", datastore.corpus.path)
        with _silent():
            encoding = measure_encoding(model, datastore, sample_pairs, folder)
        if encoding.cut:
            log.warning("%d texts of the sample were cut to the positions of the model", encoding.cut)
        pairs = encoding.pairs if entries is None else max(1, round(entries / encoding.entries))
        total = round(pairs * encoding.entries) if entries is None else entries
        with Datastore(folder) as store:
            training = Training.plan(store, index, total)
            index = replace(index, factory=training.factory, train_points=training.train_points)
            training.check(total)
            made = training.make()
            ivf = find_ivf(made)
            nlist = None if ivf is None else int(ivf.nlist)
            log.info("measuring %s", index.factory)
            with _silent():
                rates = measure_index(store, index, total)
    size = Size(total, pairs, model.key_size, nlist, training.train_points, datastore, index, machines)
    return predict(size, encoding, rates, encoding.entries_error if entries is None else 0.0)


@contextmanager
def _scratch_folder(near: Path) -> Iterator[Path]:
    """A temporary folder on the disk where a datastore is to go, if one can write there."""
    place = next(parent for parent in near.absolute().parents if parent.is_dir())
    with tempfile.TemporaryDirectory(dir=place if os.access(place, os.W_OK) else None) as folder:
        yield Path(folder)


@contextmanager
def _silent() -> Iterator[None]:
    """Progress, log and FAISS's warnings of small samples go nowhere."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stderr.flush()
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
