"""The benchmark of all methods runs, and its special cases are what they must be."""

import json
import sys
from pathlib import Path

import pytest

from lightning_knnmt.knn.settings import MixtureConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


def test_the_quick_benchmark_measures_plain_and_fixed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import methods

    path = tmp_path / "methods.json"
    methods.main(["--quick", "--json", str(path), "--repeats", "1", "--only", "confidence_gate"])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["methods"]) == ["plain", "fixed", "confidence_gate"]
    plain, fixed, gated = result["methods"].values()
    assert (plain["searches_per_token"], fixed["searches_per_token"]) == (0, 1)
    assert 0 <= gated["searches_per_token"] <= 1
    assert fixed["interval"] == {"delta": 0, "low": 0, "high": 0, "p_value": 1}
    assert plain["bytes_per_entry"] == 0 < fixed["bytes_per_entry"]
    assert fixed["bleu"] > plain["bleu"]  # the model's weights are random
    assert result["ratio"] == pytest.approx(
        max(row["tokens_per_second"] for row in (fixed, gated)) / fixed["tokens_per_second"], abs=1e-3
    )
    assert f"ratio {result['ratio']}" in capsys.readouterr().out


def test_every_method_of_the_list_is_read(tmp_path: Path) -> None:
    import method_list

    path = Path(method_list.__file__).with_name("methods.yaml")
    found = method_list.read_methods(path, store=str(tmp_path), data=str(tmp_path), out=str(tmp_path))
    tuned: dict[str, MixtureConfig] = {}
    for name, method in found.items():
        tuned[name] = method.begin(tuned)
        if method.grid is not None:
            method.full_grid(tuned[name], 100, 1).values_for(tuned[name], 8)


def test_a_method_with_seeds_is_one_for_each(tmp_path: Path) -> None:
    import method_list

    path = tmp_path / "methods.yaml"
    path.write_text(
        "a: {title: 'trained ${seed}', datastore: '${store}/a-${seed}', seeds: [1, 2]}\nb: {title: other}\n"
    )
    found = method_list.read_methods(path, store="s")
    assert {name: method.title for name, method in found.items()} == {
        "a-1": "trained 1",
        "a-2": "trained 2",
        "b": "other",
    }
    assert found["a-2"].datastore == Path("s/a-2")
    assert list(method_list.with_likes(found, {"a"})) == ["a-1", "a-2"]
    path.write_text("a: {title: it, like: none_such}\n")
    with pytest.raises(ValueError, match="like is none_such, expected the name of a method"):
        method_list.read_methods(path)
    path.write_text("a: {title: it, lambda: 1}\n")
    with pytest.raises(ValueError, match="a is no method"):
        method_list.read_methods(path)


def test_results_of_seeds_are_one_row_of_the_middle() -> None:
    import methods

    rows = {
        "fixed": {"bleu": 3.0},
        **{f"adaptive-{seed}": {"bleu": bleu} for seed, bleu in ((1, 5.0), (2, 1.0), (3, 4.0))},
    }
    merged = methods.over_seeds(rows)
    assert merged == {"fixed": {"bleu": 3.0}, "adaptive": {"bleu": 4.0, "bleu_of_seeds": [1.0, 4.0, 5.0]}}
