"""Reading, cleaning and splitting corpora starts quickly: it loads neither torch nor transformers."""

import subprocess
import sys

import pytest
from training_runs import ROOT

HEAVY = {"torch", "transformers", "lightning", "faiss", "h5py"}


@pytest.mark.parametrize("module", ["readers", "pairs", "splits", "recipes", "cleaning", "boxes"])
def test_a_module_of_corpora_loads_nothing_heavy(module: str) -> None:
    script = f"import sys, lightning_knnmt.data.{module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    loaded = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert set(loaded.split()) & HEAVY == set()
