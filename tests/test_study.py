"""The benchmarks behind docs/dispersion.md run, and their figures agree with the library's own."""

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_stores import clumpy_keys, corpus_pairs, write_store

from lightning_knnmt.data.splits import write_splits
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.balance import imbalance_factor
from lightning_knnmt.index.opening import open_index

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


def test_a_variant_is_trained_and_scored_once(
    marian_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import dispersion

    pairs = corpus_pairs(64)
    write_splits(tmp_path / "data", {"train": pairs[:40], "validation": pairs[40:52], "test": pairs[52:]}, {})
    arguments = [
        *("score", "--out", str(tmp_path / "out"), "--model", str(marian_folder), "--data", str(tmp_path / "data")),
        *("--steps", "4", "--max-tokens", "100", "--factory", "IVF4,Flat", "--sample-nlist", "2", "--nprobe", "2"),
        *("--max-new-tokens", "16", "--nlist", "4", "--shortest", "0.5"),
        *("--only", "base", "sliced, γ 1"),
    ]
    dispersion.main(arguments)
    table = capsys.readouterr().out
    folder = tmp_path / "out" / "sliced, γ 1"
    trained, scored = (json.loads((folder / f"{name}.json").read_text()) for name in ("trained", "scored"))
    names = {"loss", "knn_loss", "imbalance_factor", "homogeneity", "mean_resultant_length", "codes_scanned"}
    assert names <= set(trained["validation"])
    lists = json.loads((folder / "lists.json").read_text())["lists"]
    assert [row["sample"] for row in lists] == ["uniform", "shortest 50%"] * 4
    assert all(row["imbalance_factor"] >= 1 and 0 < row["codes_scanned"] <= 1 for row in lists)
    with Datastore(folder / "store") as store:
        assert scored["index"]["entries"] == len(store)
        sizes = torch.from_numpy(open_index(store).list_sizes())
        assert scored["index"]["imbalance_factor"] == pytest.approx(imbalance_factor(sizes))
    assert f"{scored['knn']['bleu']:.1f}" in table
    before = (folder / "scored.json").stat().st_mtime_ns
    dispersion.main(arguments)
    assert (folder / "scored.json").stat().st_mtime_ns == before
    assert capsys.readouterr().out == table


def test_a_quick_study_tells_the_gain_where_the_base_is_most_unbalanced(marian_folder: Path, tmp_path: Path) -> None:
    import dispersion

    pairs = corpus_pairs(300)
    write_splits(tmp_path / "data", {"train": pairs[:260], "validation": pairs[260:], "test": pairs[260:]}, {})
    path = tmp_path / "out.json"
    dispersion.main(
        [
            "--quick",
            "--json",
            str(path),
            "--model",
            str(marian_folder),
            "--data",
            str(tmp_path / "data"),
            "--steps",
            "2",
        ]
    )
    result = json.loads(path.read_text())
    base, dispersed = (result["lists"][name]["lists"] for name in ("base", "MHE, γ 10"))
    factors = [row["imbalance_factor"] for row in base]
    assert result["base"] == max(factors)
    assert result["ratio"] == pytest.approx(max(factors) / dispersed[factors.index(max(factors))]["imbalance_factor"])


def test_searches_of_study_models_are_timed_in_fair_and_unfair_lists(marian_folder: Path, tmp_path: Path) -> None:
    import dispersed_search

    pairs = corpus_pairs(120)
    write_splits(tmp_path / "data", {"train": pairs[:80], "validation": pairs[80:100], "test": pairs[100:]}, {})
    path = tmp_path / "out.json"
    options = ("--model", str(marian_folder), "--data", str(tmp_path / "data"), "--steps", "2")
    dispersed_search.main(["--quick", "--json", str(path), *options, "--codes", "Flat", "--max-new-tokens", "16"])
    result = json.loads(path.read_text())
    alone = [row for row in result["rows"] if row["sample"] is None]
    assert [row["model"] for row in alone] == ["base", "fine-tuned, γ 0"] == list(result["settings"])
    searched = [row for row in result["rows"] if row["sample"] is not None]
    assert {(row["sample"], row["nprobe"]) for row in searched} == {
        (sample, nprobe) for sample in ("uniform", "shortest 50%") for nprobe in (1, 8)
    }
    assert all(row["microseconds"] > 0 and row["imbalance_factor"] >= 1 for row in searched)
    unfair = {row["model"]: row["tokens_per_second"] for row in searched[-2:]}
    assert result["ratio"] == pytest.approx(unfair["fine-tuned, γ 0"] / unfair["base"])


def test_stored_states_are_measured_against_the_whole_model(
    marian_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import stored_states

    pairs = corpus_pairs(80)
    write_splits(tmp_path, {"train": pairs, "validation": [], "test": []}, {})
    path = tmp_path / "out.json"
    options = ("--data", str(tmp_path), "--max-tokens", "60", "--steps", "3")
    stored_states.main(["--quick", "--json", str(path), "--model", str(marian_folder), *options])
    result = json.loads(path.read_text())
    medians = result["steps"]["median_ms"]
    assert result["ratio"] == pytest.approx(medians["whole model"] / medians["stored states"])
    assert result["entries"] > 80 and "storing the states took" in capsys.readouterr().out


def test_an_unknown_variant_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import dispersion

    with pytest.raises(SystemExit):
        dispersion.main(["train", "--out", str(tmp_path), "--only", "sliced"])
    assert "'base', 'fine-tuned, γ 0'" in capsys.readouterr().err


def test_only_the_ways_that_are_asked_for_are_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import balance

    keys, values = clumpy_keys(600, 16)
    write_store(tmp_path / "store", keys, values).close()
    trained = []
    real = balance.metric_centroids
    monkeypatch.setattr(balance, "split_centroids", lambda *_: pytest.fail("a way that was not asked for"))
    monkeypatch.setattr(balance, "metric_centroids", lambda *args: trained.append(args[2:]) or real(*args))
    balance.main([f"clumped={tmp_path / 'store'}", "--nlist", "4", "--only", "cosine"])
    assert trained == [("cos", True)]


def test_balance_of_clumped_keys_by_training_sample(tmp_path: Path) -> None:
    import balance

    keys, values = clumpy_keys(3000, 16)
    write_store(tmp_path / "store", keys, values).close()
    balance.main(
        [f"clumped={tmp_path / 'store'}", "--nlist", "16", "--per-list", "40", "--timed", "4", "--json",
         str(tmp_path / "out.json")]
    )  # fmt: skip
    found = {row["way"]: row for row in json.loads((tmp_path / "out.json").read_text())["results"]}
    assert len(found) == 12 and "another datastore" not in found
    assert all(row["imbalance_factor"] >= 1 and 0 < row["scanned"] <= 1 for row in found.values())
    assert all(row["microseconds"] > 0 for row in found.values())
    assert found["long lists split, 30%"]["largest_list"] < found["uniform sample"]["largest_list"]


def test_a_step_of_the_last_block_is_measured_against_the_whole_models(
    marian_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_step

    path = tmp_path / "out.json"
    sizes = ("--sentences", "2", "--length", "6", "--repeats", "2")
    train_step.main(["--model", str(marian_folder), "--quick", "--json", str(path), *sizes])
    result = json.loads(path.read_text())
    medians, ratios = result["median_ms"], result["ratios"]
    assert ratios[train_step.FULL] == 1
    assert all(ratios[name] == pytest.approx(medians[name] / medians[train_step.FULL], abs=1e-2) for name in medians)
    assert f"ratio {ratios['last block, sliced dispersion']}" in capsys.readouterr().out


def test_curves_are_drawn_of_what_the_callback_logged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import curves

    names = ["step", "train/loss", *curves.PANELS]
    rows = [["9", "5.0", "", "", ""], ["99", "", "4.0", "1.5", "0.4"], ["199", "", "3.0", "1.25", "0.2"]]
    path = tmp_path / "metrics.csv"
    path.write_text("".join(",".join(row) + "\n" for row in [names, *rows]))
    curves.main([f"tiny={path}", "--picture", str(tmp_path / "curves.png")])
    assert "| tiny | 200  | 3.00" in capsys.readouterr().out
    assert (tmp_path / "curves.png").stat().st_size > 1000
    path.write_text("step,val/loss\n9,1.0\n")
    with pytest.raises(ValueError, match="train with the callback IndexHealth"):
        curves.main([f"tiny={path}"])
