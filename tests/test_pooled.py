"""Several datastores searched as one, against one that holds the entries of all."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from script_runs import DECODING, Domain, expect_error, run, write_config
from test_knn import VOCABULARY, softmax

import build_index
import evaluate
import translate
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.combiners.weighted_stores import WeightedStores
from lightning_knnmt.knn.memory import RamMemory
from lightning_knnmt.knn.neighbors import Neighbors
from lightning_knnmt.knn.pooled import PooledMemory
from lightning_knnmt.knn.step import Step
from lightning_knnmt.loading import load_translator

D, SIZES = 5, (30, 1, 12)


def memories(seed: int = 0) -> dict[str, RamMemory]:
    rng = np.random.default_rng(seed)
    found = {}
    for number, size in enumerate(SIZES):
        keys = torch.from_numpy(rng.normal(size=(size, D)).astype(np.float32))
        values = torch.from_numpy(rng.integers(0, VOCABULARY, size))
        pairs = [Pair(f"{number} source {row}", "target") for row in range(size)]
        found[f"store {number}"] = RamMemory(keys, values, pairs, [1] * size)
    return found


def queries_of(rows: int = 9) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("k", [1, 7, 20, 60])
def test_pooled_memories_find_what_one_memory_of_all_entries_finds(k: int) -> None:
    parts = memories()
    pooled = PooledMemory(parts)
    keys, values = (torch.cat([getattr(part, name) for part in parts.values()]) for name in ("keys", "values"))
    pairs = [pair for part in parts.values() for pair in part.pairs]
    whole = RamMemory(keys, values, pairs, [1] * len(pairs))
    found, expected = (memory.search(queries_of(), k) for memory in (pooled, whole))
    torch.testing.assert_close(found.distances, expected.distances)
    assert found.ids.equal(expected.ids) and found.values.equal(expected.values)
    assert len(pooled) == len(whole) and list(pooled.sources()) == list(whole.sources())
    assert pooled.keys_of(found.ids).equal(whole.keys_of(found.ids))
    assert pooled.values_of(found.ids).equal(whole.values_of(found.ids))
    for entry in range(len(whole)):
        context = pooled.context(entry)
        assert context.pair == whole.context(entry).pair
        assert context.store == f"store {context.pair.src[0]}"
        assert int(pooled.store_of(torch.tensor([entry]))) == int(context.pair.src[0])


def test_pooled_of_one_is_that_one() -> None:
    name, memory = next(iter(memories().items()))
    pooled = PooledMemory({name: memory})
    for each, same in zip(pooled.search(queries_of(), 9).parts, memory.search(queries_of(), 9).parts, strict=True):
        assert each.equal(same)
    assert pooled.fingerprint == memory.fingerprint and pooled.nlist is memory.nlist
    neighbors, step = memory.search(queries_of(), 9), step_of_queries()
    combiner = WeightedStores([3.0], 0.7, 4.0)
    combiner.bind(None, memory)  # type: ignore[arg-type]
    torch.testing.assert_close(combiner(step, neighbors), FixedCombiner(0.7, 4.0)(step, neighbors))


def step_of_queries() -> Step:
    logits = 3 * torch.randn(9, VOCABULARY, generator=torch.Generator().manual_seed(4))
    return Step(queries_of(), logits, torch.arange(9))


def test_weighted_stores_are_the_mean_of_the_distributions_of_each() -> None:
    pooled, weights, temperature, lambda_ = PooledMemory(memories()), [0.5, 3.0, 1.0], 4.0, 0.6
    neighbors, step = pooled.search(queries_of(), 12), step_of_queries()
    neighbors.ids[3], neighbors.distances[3], neighbors.values[3] = -1, torch.inf, 0
    combiner = WeightedStores(weights, lambda_, temperature)
    combiner.bind(None, pooled)  # type: ignore[arg-type]
    model = softmax(step.logits.double().numpy())
    for row, mixed in enumerate(combiner(step, neighbors).double().softmax(1).numpy()):
        knn, total = np.zeros(VOCABULARY), 0.0
        for number, weight in enumerate(weights):
            mine = [p for p in range(12) if int(pooled.store_of(neighbors.ids[row, p : p + 1])) == number]
            if mine:
                shares = np.exp([-float(neighbors.distances[row, p]) / temperature for p in mine])
                for place, share in zip(mine, shares / shares.sum(), strict=True):
                    knn[int(neighbors.values[row, place])] += weight * share
                total += weight
        expected = model[row] if not total else lambda_ * knn / total + (1 - lambda_) * model[row]
        np.testing.assert_allclose(mixed, expected, rtol=1e-4, atol=1e-7)


def test_merged_entries_keep_their_weights_beside_memories_without() -> None:
    class Merged(RamMemory):
        def search(self, queries: torch.Tensor, k: int, *options: Any) -> Neighbors:  # type: ignore[override]
            return Neighbors(*super().search(queries, k).parts, weights=torch.full((len(queries), k), 3))

    parts = memories()
    first = parts["store 0"]
    parts["store 0"] = Merged(first.keys, first.values, first.pairs, [1] * len(first))
    found = PooledMemory(parts).search(queries_of(), 10)
    assert found.weights is not None
    assert found.weights.equal(torch.where(found.ids < SIZES[0], 3, 1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PooledMemory({}), "there are no memories to pool, expected one or more"),
        (lambda: WeightedStores([]), "weights is empty, expected one for each datastore"),
        (lambda: WeightedStores([1.0, 0.0]), "weights is 0.0, expected more than 0"),
        (
            lambda: WeightedStores([1.0]).bind(None, PooledMemory(memories())),  # type: ignore[arg-type]
            "weights has 1 numbers, expected 3, one for each datastore",
        ),
        (
            lambda: PooledMemory(
                {**memories(), "x": RamMemory(torch.zeros(1, 2), torch.zeros(1), [Pair("", "")], [1])}
            ),
            "key_size is 5 of store 0, .* 2 of x, expected the same",
        ),
    ],
)
def test_what_does_not_fit_together_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- scripts


def test_scripts_pool_datastores_and_say_which(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = (domain.root / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines.sort(key=lambda line: json.loads(line)["tgt"])  # so that each datastore has sentences of its own
    for number, half in enumerate((lines[: len(lines) // 2], lines[len(lines) // 2 :])):
        (tmp_path / f"{number}.jsonl").write_text("".join(half), encoding="utf-8")
        config = {
            "backbone": {"model": domain.model, "device": "cpu"},
            "datastore": {"folder": tmp_path / f"store-{number}", "corpus": {"path": tmp_path / f"{number}.jsonl"}},
            "index": {"factory": "Flat"},
        }
        run(build_index.build, "--config", write_config(tmp_path / "build.yaml", config))
    knn = {"k": 5, "lambda_": 0.8, "temperature": 8.0}
    common = {"backbone": {"model": str(domain.model), "device": "cpu"}, "decoding": DECODING, "knn": knn}
    pooled = {**common, "datastore": tmp_path / "store-0", "pooled_with": [str(tmp_path / "store-1")]}
    path = write_config(tmp_path / "pooled.yaml", pooled)
    translator = load_translator(path)
    memory = translator.mixture.memory  # type: ignore[union-attr]
    assert isinstance(memory, PooledMemory) and list(memory.memories) == [str(tmp_path / f"store-{n}") for n in (0, 1)]
    (tmp_path / "in.txt").write_text("\n".join(domain.sources("test")) + "\n", encoding="utf-8")
    out = tmp_path / "out.txt"
    files = ("--input", tmp_path / "in.txt", "--output", out)
    run(translate.translate, "--config", path, *files, "--explain", "2")
    explained = out.read_text(encoding="utf-8")
    assert all(f"({tmp_path / f'store-{number}'})" in explained for number in range(2))
    evaluation = {
        **pooled,
        "test": {"path": domain.root / "data" / "test.jsonl"},
        "tuning": {
            "validation": {"path": domain.root / "data" / "validation.jsonl"},
            "grid": {"k": [4], "lambda_": [0.5], "nprobe": [4], "temperature": [8.0], "finalists": 1},
        },
        "combiner": {"class_path": "lightning_knnmt.knn.combiners.weighted_stores.WeightedStores",
                     "init_args": {"weights": [1.0, 2.0]}},
        "repeats": 1, "out": tmp_path / "out",
    }  # fmt: skip
    run(evaluate.evaluate, "--config", write_config(tmp_path / "evaluate.yaml", evaluation))
    written = yaml.safe_load((tmp_path / "out" / "translate.yaml").read_text(encoding="utf-8"))
    assert written["pooled_with"] == [str(tmp_path / "store-1")]
    assert written["combiner"]["init_args"]["weights"] == [1.0, 2.0]
    load_translator(tmp_path / "out" / "translate.yaml")
    del pooled["datastore"]
    capsys.readouterr()
    expect_error(
        capsys, translate.translate, "--config", write_config(tmp_path / "none.yaml", pooled), "--input",
        tmp_path / "in.txt", expected="pooled_with is given without a datastore",
    )  # fmt: skip
