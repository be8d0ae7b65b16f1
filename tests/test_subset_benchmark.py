"""The benchmark of subset search: its random index is searched as FAISS searches any other."""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import subset


def test_distances_in_random_codes_are_those_of_faiss() -> None:
    rng = np.random.default_rng(0)
    memory = subset.RandomMemory(400, 16, 8, 4, rng)
    queries = rng.normal(size=(3, 16)).astype(np.float32)
    distances, ids = memory.index.search(queries, 400, nprobe=8)
    assert sorted(ids[0]) == list(range(400))
    seen = torch.from_numpy(queries)
    coded = memory.product_codes().take(torch.arange(400))
    found = coded.distances(seen, memory.codes.tables(seen)).numpy()
    np.testing.assert_allclose(np.take_along_axis(found, ids, 1), distances, rtol=1e-4, atol=1e-3)
    assert memory.entries_of(np.array([2, 0])).tolist() == [*range(40, 60), *range(20)]
