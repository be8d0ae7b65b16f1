"""The benchmark of search: what it calls exact, recall, error and growth, checked against plain loops."""

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_stores import build_store, clumpy_keys, corpus_pairs, write_corpus, write_store

from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.datastore import DatastoreConfig
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.datastore.removed import Removed
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.neighbors import Neighbors

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import memory
import search
import search_report
import search_settings
import stores

SMALL = ["--repeats", "1", "--batch", "1", "8", "--k", "4", "--threads", str(torch.get_num_threads())]


def some_neighbors(rows: int, k: int, seed: int) -> Neighbors:
    generator = torch.Generator().manual_seed(seed)
    distances = torch.rand(rows, k, generator=generator).sort(1).values * 5
    ids = torch.stack([torch.randperm(30, generator=generator)[:k] for _ in range(rows)])
    return Neighbors(distances, ids % 7, ids)


def distribution(distances: NDArray[Any], values: NDArray[Any], temperature: float) -> Counter[int]:
    weights = np.exp(-distances.astype(np.float64) / temperature)
    shares: Counter[int] = Counter()
    for value, weight in zip(values, weights / weights.sum(), strict=True):
        shares[int(value)] += weight
    return shares


def test_exact_neighbors_are_those_of_a_full_sort_over_shards_and_chunks(tmp_path: Path) -> None:
    keys, values = clumpy_keys(500, 8)
    queries = np.concatenate([clumpy_keys(20, 8, seed=3)[0], keys[:5]]).astype(np.float32)  # some are stored
    with write_store(tmp_path / "store", keys, values, [170, 230, 100]) as store:
        distances, ids = stores.exact_neighbors(store, queries, 12, chunk=64)
    expected = ((queries[:, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(2)
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :12], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), distances, rtol=1e-5, atol=1e-6)
    assert distances[-5:, 0].tolist() == [0] * 5


def test_exact_neighbors_are_none_that_were_removed(tmp_path: Path) -> None:
    keys, values = clumpy_keys(500, 8)
    queries = keys[::25].astype(np.float32)  # some of which are gone
    with write_store(tmp_path / "store", keys, values, [170, 330]) as store:
        store.removed = Removed(np.array([20, 160]), np.array([60, 300]))  # with the whole of a chunk
        distances, ids = stores.exact_neighbors(store, queries, 12, chunk=64)
    expected = ((queries[:, None].astype(np.float64) - keys[None].astype(np.float64)) ** 2).sum(2)
    expected[:, 20:60] = expected[:, 160:300] = np.inf
    np.testing.assert_allclose(distances, np.sort(expected, axis=1)[:, :12], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.take_along_axis(expected, ids, 1), distances, rtol=1e-5, atol=1e-6)


def test_exact_neighbors_are_read_where_an_earlier_run_left_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys, values = clumpy_keys(60, 4)
    with write_store(tmp_path / "store", keys, values) as store, monkeypatch.context() as patch:
        clock = iter(range(0, 1000, 100))  # every look at it is 100 seconds later
        patch.setattr(search.time, "perf_counter", lambda: next(clock))
        first = search.exact(store, keys[:3].astype(np.float32), 2, tmp_path / "out.json")
        assert len(list(tmp_path.glob("out.exact-*.npz"))) == 1
        patch.setattr(stores, "exact_neighbors", None)
        again = search.exact(store, keys[:3].astype(np.float32), 2, tmp_path / "out.json")
    assert torch.equal(first.ids, again.ids) and torch.equal(first.values, again.values)


def test_recall_counts_every_entry_as_near_as_the_last_exact_one() -> None:
    exact = Neighbors(
        torch.tensor([[0.0, 1, 1, 1, 3], [1, 2, 3, 4, 5]]), torch.zeros(2, 5).long(), torch.arange(10).view(2, 5)
    )
    assert search_settings.recall(torch.tensor([[0, 3], [5, 6]]), exact, 2) == 1
    assert search_settings.recall(torch.tensor([[3, 2], [6, 7]]), exact, 2) == 0.75
    assert search_settings.recall(torch.tensor([[4, 2], [-1, -1]]), exact, 2) == 0.25


def test_total_variation_is_half_the_summed_difference_of_the_distributions() -> None:
    found, exact = some_neighbors(6, 5, seed=1), some_neighbors(6, 8, seed=2)
    expected = []
    for row in range(6):
        p, q = (
            distribution(neighbors.distances[row].numpy(), neighbors.values[row].numpy(), 2.0)
            for neighbors in (found, exact)
        )
        expected.append(sum(abs(p[value] - q[value]) for value in {*p, *q}) / 2)
    assert search_settings.total_variation(found, exact, 2.0) == pytest.approx(np.mean(expected), abs=1e-6)
    assert search_settings.total_variation(exact, exact, 2.0) == pytest.approx(0, abs=1e-6)
    nothing = Neighbors(torch.full((6, 2), torch.inf), torch.zeros(6, 2).long(), torch.full((6, 2), -1))
    assert search_settings.total_variation(nothing, exact, 2.0) == 1


def test_clumps_make_uneven_lists_of_skewed_tokens_in_several_shards(tmp_path: Path) -> None:
    clumps = stores.Clumps(16, vocabulary=500)
    with stores.synthetic_store(tmp_path / "store", clumps, 6000) as store:
        assert [shard.entries for shard in store.manifest.shards] == [1500] * 4
        tokens = np.bincount(store.values, minlength=500)
        report = build_index(store, IndexConfig("IVF64,Flat", name="lists"))
        keys, fingerprint = store.sample_keys(6000), store.fingerprint
    assert tokens[0] > 8 * tokens[9] > 0  # 1/1 against 1/10
    assert report.imbalance_factor is not None and report.imbalance_factor > 1.5
    assert not (clumps.queries(50)[:, None] == keys[None]).all(2).any()
    with stores.synthetic_store(tmp_path / "store", stores.Clumps(16, vocabulary=500), 6000) as again:
        assert again.fingerprint == fingerprint
    with pytest.raises(ValueError, match=r"holds another datastore, Zipf clumps, D 16, V 500, seed 1.*--folder"):
        stores.synthetic_store(tmp_path / "store", stores.Clumps(16, vocabulary=500, seed=2), 6000)


@pytest.mark.skipif(not memory.STATUS.exists(), reason="only Linux tells a process's resident memory")
def test_memory_is_that_of_a_process_of_its_own() -> None:
    ballast = np.ones(2**25)  # 256 MB, which no other process sees
    with memory.OwnProcesses() as processes:
        before, numbers, after = (processes.run(work) for work in (memory.resident, _count, memory.resident))
    assert memory.resident()["anonymous"] > ballast.nbytes / 2**20
    assert numbers["peak"] > before["peak"] + 100
    for found in (before, after):
        assert 0 < found["anonymous"] <= found["peak"] < numbers["peak"] - 50
        assert found["anonymous"] < memory.resident()["anonymous"] - 150


def _count() -> dict[str, float]:
    np.ones(2**24)  # 128 MB
    return memory.resident()


@pytest.mark.skipif(not memory.STATUS.exists(), reason="only Linux tells a process's resident memory")
def test_memory_is_told_beside_the_size_of_the_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_here(_: memory.OwnProcesses, work: Callable[..., Any], *arguments: Any) -> Any:
        return work(*arguments)  # other processes take seconds to start

    monkeypatch.setattr(memory.OwnProcesses, "run", run_here)
    arguments = [
        "--quick", "--synthetic", "4000", "--key-size", "16", "--folder", str(tmp_path / "made"), "--memory",
        "--factories", "IVF8,SQ8", "HNSW4", "--part-entries", "2000", "--json", str(tmp_path / "out.json"), *SMALL,
    ]  # fmt: skip
    search.main(arguments)
    first = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["stores"]["4,000 clumped keys"]["indexes"]
    assert [index["codes_mb"] for index in first.values()] == [4000 * 17 / 2**20, 4000 * 64 / 2**20]  # 1 byte: the list
    for index in first.values():
        assert set(index["memory"]) == {"build", "search", "mapped"}
        for way in ("search", "mapped"):
            found = index["memory"][way]
            assert 0 < found["idle"] <= found["peak"] and 0 < found["anonymous"] <= found["peak"]
    codes, peak = first["IVF8,SQ8"]["codes_mb"], first["IVF8,SQ8"]["memory"]["search"]["peak"]
    printed = capsys.readouterr().out
    assert f"{peak:,.0f}" in printed and f"{peak - codes:,.0f}" in printed
    search.main(arguments)  # finds the indexes, and what building them took
    again = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["stores"]["4,000 clumped keys"]["indexes"]
    assert [index["memory"]["build"] for index in again.values()] == [
        index["memory"]["build"] for index in first.values()
    ]


def test_growth_is_the_exponent_that_was_planted() -> None:
    def store(entries: int) -> dict[str, Any]:
        rows = [
            {
                "factory": "IVFauto,Flat", "parameter": "nprobe", "value": nprobe, "total_variation": 0.4 / nprobe,
                "microseconds": {"1": nprobe * entries**0.7, "32": nprobe * entries**0.5},
            }
            for nprobe in (1, 4, 16)
        ]  # fmt: skip
        return {"synthetic": True, "entries": entries, "rows": rows}

    options = {"factories": ["IVFauto,Flat"], "batch": [1, 32], "error": 0.2}
    result = {"options": options, "stores": {str(entries): store(entries) for entries in (1000, 10_000, 100_000)}}
    found = search_report.exponents(result)
    assert list(found) == [*(f"IVFauto,Flat, nprobe {n}" for n in (1, 4, 16)), "IVFauto,Flat, total variation 0.2"]
    for of_batch in found.values():
        assert of_batch == {"1": pytest.approx(0.7), "32": pytest.approx(0.5)}
    rows = result["stores"]["1000"]["rows"]  # type: ignore[index]
    assert search_report.time_at(rows, 0.2, "32") == pytest.approx(2 * 1000**0.5)  # error 0.2 is at nprobe 2
    assert search_report.time_at(rows, 0.5, "32") is None


def test_real_datastores_are_measured_and_decoded_with_every_setting(
    backbone: KeyedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pairs = corpus_pairs(120)
    with build_store(backbone, tmp_path / "store", pairs[:80]) as store:
        entries = len(store)
    test, validation = (write_corpus(tmp_path / f"{n}.jsonl", pairs[n : n + 15]).path for n in (80, 100))
    arguments = [
        "--stores", f"tiny={tmp_path / 'store'}", "--test", str(test), "--validation", str(validation), "--bleu",
        "--factories", "IVF4,Flat", "Flat", "HNSW4", "--nprobe", "1", "4", "9", "--ef-search", "8", "64",
        "--queries", "30", "--json", str(tmp_path / "out.json"), "--picture", str(tmp_path / "out.png"), *SMALL,
    ]  # fmt: skip
    search.main(arguments)
    printed = capsys.readouterr().out
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["stores"]["tiny"]
    settings = {(row["factory"], row["parameter"], row["value"]): row for row in result["rows"]}
    assert list(settings) == [
        ("IVF4,Flat", "nprobe", 1), ("IVF4,Flat", "nprobe", 4), ("Flat", None, None), ("HNSW4", "efSearch", 8),
        ("HNSW4", "efSearch", 64),
    ]  # fmt: skip
    assert result["baseline"] == 1
    plain = result["rows"][2]
    for name in ("IVF4,Flat", "Flat"):  # exact: all lists, no lists
        row = settings[(name, "nprobe", 4) if "IVF" in name else (name, None, None)]
        assert (row["recall"], row["codes_scanned"]) == (1, entries)
        assert row["total_variation"] == pytest.approx(0, abs=1e-4)
        assert row["decoding"]["bleu"] == plain["decoding"]["bleu"]
        assert row["log_likelihood"] == pytest.approx(plain["log_likelihood"], abs=1e-4)
        assert set(row["microseconds"]) == {"1", "8"}
    assert settings["IVF4,Flat", "nprobe", 1]["codes_scanned"] < entries
    assert settings["HNSW4", "efSearch", 64]["recall"] > 0.9
    assert "**IVF4,Flat**" in printed and "(no neighbors)" in printed and "Growth" not in printed
    assert (tmp_path / "out.png").stat().st_size > 10_000

    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*.faiss")}
    search.main(arguments[:4] + arguments[7:])  # neither validation split nor decoding
    assert len(files) == 3 and {path: path.stat().st_mtime_ns for path in files} == files


def test_a_store_that_has_changed_is_searched_as_it_is_now(backbone: KeyedModel, tmp_path: Path) -> None:
    pairs = corpus_pairs(120)
    build_store(backbone, tmp_path / "store", pairs[:60]).close()
    test = write_corpus(tmp_path / "test.jsonl", pairs[100:]).path
    arguments = [
        "--stores", f"tiny={tmp_path / 'store'}", "--test", str(test),
        "--factories", "IVF4,Flat", "Flat", "--nprobe", "4", "--queries", "30", "--json", str(tmp_path / "out.json"),
        *SMALL,
    ]  # fmt: skip
    search.main(arguments)
    append_pairs(backbone, DatastoreConfig(tmp_path / "store", write_corpus(tmp_path / "new.jsonl", pairs[60:100])))
    remove_documents(tmp_path / "store", ["page-1"])
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*.faiss")}
    search.main(arguments)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*.faiss")} == files
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))["stores"]["tiny"]
    with Datastore(tmp_path / "store") as store:
        assert result["entries"] == len(store) and 0 < len(store.removed) < len(store)
    for row in result["rows"]:
        assert row["recall"] == 1 and row["total_variation"] == pytest.approx(0, abs=1e-4)
    size = (tmp_path / "store" / "Flat.1.faiss").stat().st_size
    assert result["indexes"]["Flat"]["bytes_per_entry"] == size / result["entries"]


def test_quick_run_needs_no_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    factories = ["IVFauto,PQ8x4fs,Refine(SQfp16)", "Flat"]
    sizes = ["--synthetic", "600", "1500", "--key-size", "16", "--folder", str(tmp_path / "made")]
    search.main(["--quick", *sizes, "--factories", *factories, "--json", str(tmp_path / "out.json"), *SMALL])
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert [store["entries"] for store in result["stores"].values()] == [600, 1500]
    assert {f"{factories[0]}, nprobe 4", "Flat"} <= set(result["exponents"])
    with stores.synthetic_store(tmp_path / "made" / "clumps-1500x16-1", stores.Clumps(16), 1500) as store:
        assert open_index(store, "IVF32-PQ8x4fs-Refine-SQfp16").nlist == 32
    assert "Growth with N" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --stores, --synthetic or --quick"),
        (["--stores", "runs/demo/store"], "'runs/demo/store' is not LABEL=PATH"),
        (["--stores", "demo=runs/demo/store"], "without --test"),
        (["--quick", "--batch", "500"], "--batch is 500, expected at most --queries, which is 128"),
        (["--quick", "--lambda", "1"], r"--lambda is 1.0, expected between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        search.main(arguments)
    assert message in capsys.readouterr().err
