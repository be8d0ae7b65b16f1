"""The benchmark of all methods runs, and its special cases are what they must be."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from lightning_knnmt.knn.settings import MixtureConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))


def test_the_quick_benchmark_measures_methods_that_are_made_on_the_spot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import methods

    path = tmp_path / "methods.json"
    names = ["confidence_gate", "sk_mt", "merged"]
    methods.main(["--quick", "--json", str(path), "--repeats", "1", "--only", *names])
    result = json.loads(path.read_text(encoding="utf-8"))
    assert list(result["methods"]) == ["plain", "fixed", *names]
    plain, fixed, *others = result["methods"].values()
    assert (plain["searches_per_token"], fixed["searches_per_token"]) == (0, 1)
    assert all(0 <= row["searches_per_token"] <= 1 for row in others)
    assert fixed["interval"] == {"delta": 0, "low": 0, "high": 0, "p_value": 1}
    assert plain["bytes_per_entry"] == others[1]["bytes_per_entry"] == 0 < fixed["bytes_per_entry"]
    assert 0 < others[2]["entries"] < fixed["entries"]
    assert fixed["bleu"] > plain["bleu"]  # the model's weights are random
    fit = [row["tokens_per_second"] for row in (fixed, *others) if row["interval"]["high"] >= 0]
    assert result["ratio"] == pytest.approx(max(fit) / fixed["tokens_per_second"], abs=1e-3)
    assert f"ratio {result['ratio']}" in capsys.readouterr().out


def test_every_method_of_the_list_has_options_that_fit(tmp_path: Path) -> None:
    import method_list

    path = Path(method_list.__file__).with_name("methods.yaml")
    untrained = [
        name for name, options in yaml.safe_load(path.read_text(encoding="utf-8")).items() if "seeds" not in options
    ]
    words = dict.fromkeys(("model", "store", "data", "out"), str(tmp_path))
    found = method_list.read_methods(path, words, untrained, make=False)
    assert list(found) == untrained
    tuned: dict[str, MixtureConfig] = {}
    for name, method in found.items():
        tuned[name] = method.begin(tuned)
        if method.grid is not None:
            method.full_grid(tuned[name], 100, 1).values_for(tuned[name], 8)


def test_a_method_with_seeds_is_one_for_each(tmp_path: Path) -> None:
    import method_list

    path = tmp_path / "methods.yaml"
    path.write_text(
        "a: {title: 'trained ${seed}', datastore: '${store}/a-${seed}', seeds: [1, 2]}\nb: {title: other, like: a}"
    )
    found = method_list.read_methods(path, {"store": "s"}, ["a"])
    assert {name: method.title for name, method in found.items()} == {"a-1": "trained 1", "a-2": "trained 2"}
    assert found["a-2"].datastore == Path("s/a-2")
    assert list(method_list.read_methods(path, {}, ["b"], quick=True)) == ["a-1", "b"]  # with what it is like
    path.write_text("a: {title: it, like: none_such}\n")
    with pytest.raises(ValueError, match="none_such is no method of"):
        method_list.read_methods(path, {})
    path.write_text("a: {title: it, lambda: 1}\n")
    with pytest.raises(ValueError, match="a is no method"):
        method_list.read_methods(path, {})


def test_results_of_seeds_are_one_row_of_the_middle() -> None:
    import methods

    seeds = {f"adaptive-{seed}": {"bleu": bleu} for seed, bleu in ((1, 5.0), (2, 1.0), (3, 4.0))}
    merged = methods.over_seeds({"fixed": {"bleu": 3.0}, **seeds})
    assert merged == {"fixed": {"bleu": 3.0}, "adaptive": {"bleu": 4.0, "bleu_of_seeds": [1.0, 4.0, 5.0]}}
