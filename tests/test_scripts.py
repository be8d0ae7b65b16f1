"""The scripts from end to end, with a tiny model and a tiny corpus that can be learned by heart."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from script_runs import DECODING, Domain, expect_error, run, write_config
from test_comet import needs_comet, offline, tiny  # noqa: F401, the fixtures

import build_index
import evaluate
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.cli import run_script
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.scores import corpus_scores
from lightning_knnmt.storage.files import file_sha256


def test_a_memorised_domain_makes_knn_better_than_a_random_model(domain: Domain):
    systems = domain.results["systems"]
    assert systems["base"]["bleu"] < 10
    assert systems["knn"]["bleu"] > systems["base"]["bleu"] + 40
    assert systems["knn"]["chrf"] > systems["base"]["chrf"] + 20
    assert domain.results["significance"]["knn"]["bleu"]["delta"] == pytest.approx(
        systems["knn"]["bleu"] - systems["base"]["bleu"], abs=1e-3
    )


def test_lambda_is_tuned_to_the_store(domain: Domain):
    results = domain.results
    assert results["settings"]["knn"]["lambda_"] == 0.9  # a random model has nothing to say
    assert results["settings"]["knn"] == results["tuning"]["best"] == results["tuning"]["finalists"][0]["settings"]
    assert results["tuning"]["finalists"][0]["log_likelihood"] > results["tuning"]["plain_log_likelihood"] + 1
    assert results["settings"]["grid"]["lambda_"] == [0.3, 0.9]


def test_results_hold_what_others_rely_on(domain: Domain):
    results = domain.results
    for name in ("base", "knn"):
        assert {"bleu", "chrf", "tokens_per_second"} <= set(results["systems"][name])
        assert results["systems"][name]["tokens_per_second"] > 0
        assert results["systems"][name]["repeatable"] is True
        assert results["systems"][name]["comet"] is None
    assert results["comet"] == {"model": None, "missing": "not asked for"}
    assert {"entries", "nlist", "imbalance_factor", "homogeneity"} <= set(results["index"])
    assert results["index"]["nlist"] == 4
    assert 1 <= results["index"]["imbalance_factor"] <= 4
    assert 0 < results["index"]["homogeneity"] <= 1
    assert 50 < results["peak_memory_mb"] < 20_000


def test_results_hold_every_setting(domain: Domain):
    settings = domain.results["settings"]
    for split in ("test", "validation"):
        assert settings[split]["sha256"] == [file_sha256(domain.root / "data" / f"{split}.jsonl")]
        assert settings[split]["sentences"] == 8
    backbone = load_model(str(domain.model), device="cpu")
    assert settings["model"]["model_sha256"] == backbone.model_fingerprint
    assert settings["model"]["tokenizer_sha256"] == backbone.tokenizer_fingerprint
    assert settings["model"]["dtype"] == "float32"
    assert settings["datastore"]["provenance"]["model_sha256"] == backbone.model_fingerprint
    assert domain.results["index"]["datastore_sha256"] == file_sha256(domain.root / "store" / "manifest.json")
    assert settings["decoding"] == DECODING | {"options": {}, "loop": "own", "shortlist": None}
    assert (settings["repeats"], settings["seed"], domain.results["index"]["seed"]) == (2, 1, 1)
    assert settings["threads"]["torch"] == torch.get_num_threads()
    assert settings["device"] == "cpu"
    assert {"torch", "transformers", "sacrebleu", "python"} <= set(settings["libraries"])
    assert "seed:12345" in domain.results["significance"]["knn"]["bleu"]["signature"]


def test_the_markdown_holds_the_table_and_one_line_of_settings(domain: Domain):
    lines = (domain.root / "out" / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in lines[:4:2]] == ["system", "base"]
    knn = domain.results["settings"]["knn"]
    settings, _, system = lines[5:]
    assert system.startswith("- knn: k ") and "IVF4,Flat over" in system
    chosen = f"k {knn['k']}, λ {knn['lambda_']:g}, T {knn['temperature']:g}, nprobe {knn['nprobe']} (best of"
    assert chosen in settings
    assert domain.results["systems"]["base"]["signatures"]["bleu"] in settings


def test_a_picture_of_the_lists_is_written(domain: Domain):
    assert (domain.root / "out" / "cluster_sizes.png").read_bytes().startswith(b"\x89PNG")


def test_build_json_holds_time_and_memory_by_stage_and_reaches_the_results(domain: Domain):
    record = json.loads((domain.root / "store" / "build.json").read_text(encoding="utf-8"))
    assert record["encode"]["entries"] == domain.results["index"]["entries"]
    assert record["encode"]["seconds"] > 0
    built = record["indexes"]["index"]
    assert set(built["seconds"]) == {"sample", "train", "add", "write"}
    assert built["peak_memory_mb"] >= record["encode"]["peak_memory_mb"] > 50
    sizes = built["list_sizes"]
    assert sizes["smallest"] <= sizes["median"] <= sizes["largest"] < record["encode"]["entries"]
    assert domain.results["build"] == {"encode": record["encode"], "index": built}


def test_a_second_build_changes_nothing(domain: Domain, caplog: pytest.LogCaptureFixture):
    def files() -> dict[str, tuple[int, str]]:
        return {path.name: (path.stat().st_mtime_ns, file_sha256(path)) for path in (domain.root / "store").iterdir()}

    before = files()
    caplog.set_level(logging.INFO)
    run(build_index.build, "--config", domain.root / "build.yaml")
    assert files() == before
    assert caplog.text.count("already built") == 2
    assert "list sizes: smallest" in caplog.text


def test_a_second_index_adds_to_the_record(domain: Domain):
    path = domain.root / "store" / "build.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    run(build_index.build, "--config", domain.root / "build.yaml", "--index.factory", "Flat", "--index.name", "flat")
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["encode"] == before["encode"]
    assert after["indexes"]["index"] == before["indexes"]["index"]
    assert "list_sizes" not in after["indexes"]["flat"]


def test_evaluate_refuses_the_store_of_another_model(
    domain: Domain, tiny_folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    other = tiny_folder_of("marian")
    args = ("--config", domain.root / "evaluate.yaml", "--backbone.model", other)
    expect_error(capsys, evaluate.evaluate, *args, expected=f"does not fit the model {other}: model {domain.model} (")


def test_another_model_is_compared_with_a_datastore_of_its_own(
    domain: Domain, tiny_folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    model, store = str(tiny_folder_of("marian")), str(tmp_path / "store")
    options = ("--backbone.model", model, "--datastore.folder", store, "--index.factory", "IVF2,Flat")
    run(build_index.build, "--config", domain.root / "build.yaml", *options)
    others = write_config(tmp_path / "others.yaml", {"others": {"dispersed": {"model": model, "datastore": store}}})
    args = ("--config", domain.root / "evaluate.yaml", "--config", others, "--repeats", "1")
    run(evaluate.evaluate, *args, "--out", tmp_path / "out")
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    systems = results["systems"]
    assert list(systems) == ["base", "knn", "dispersed", "knn_dispersed"]
    assert systems["knn_dispersed"]["index"]["nlist"] == 2
    assert systems["knn"]["index"] == results["index"] == domain.results["index"]
    assert systems["knn_dispersed"]["tuning"]["best"] == systems["knn_dispersed"]["knn"]
    assert set(results["significance"]) == {"knn", "dispersed", "knn_dispersed"}
    sources = domain.sources("test")
    texts = Translator(load_model(model, device="cpu"), decoding=Decoding(**DECODING)).translate(sources).texts
    assert systems["dispersed"]["bleu"] == pytest.approx(
        corpus_scores(texts, domain.references("test")).bleu.value, abs=1e-3
    )
    swapped = {"others": {"dispersed": {"model": str(domain.model), "datastore": store}}}
    args = ("--config", domain.root / "evaluate.yaml", "--config", write_config(tmp_path / "swapped.yaml", swapped))
    expect_error(capsys, evaluate.evaluate, *args, expected=f"does not fit the model {domain.model}: model {model} (")


@pytest.mark.parametrize("validation", ["test", "validation plus one"])
def test_evaluate_refuses_to_tune_on_test_sentences(
    validation: str, domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    data = domain.root / "data"
    file, shared, total = data / "test.jsonl", 8, 8
    if validation != "test":
        file, shared, total = tmp_path / "mixed.jsonl", 1, 9
        pair = {"src": domain.sources("test")[0].upper(), "tgt": "whatever"}
        file.write_text((data / "validation.jsonl").read_text(encoding="utf-8") + json.dumps(pair), encoding="utf-8")
    args = ("--config", domain.root / "evaluate.yaml", "--tuning.validation.path", file)
    expected = f"{shared} of {total} validation sources are in the test split too"
    expect_error(capsys, evaluate.evaluate, *args, expected=expected)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluate_names_the_empty_split(split: str, domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    option = "--test.path" if split == "test" else "--tuning.validation.path"
    args = ("--config", domain.root / "evaluate.yaml", option, tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    expect_error(capsys, evaluate.evaluate, *args, expected=f"the {split} split is empty")


def test_testing_on_the_stored_corpus_is_reported(domain: Domain, tmp_path: Path, caplog: pytest.LogCaptureFixture):
    lines = (domain.root / "data" / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    few = tmp_path / "few.jsonl"
    few.write_text("".join(lines[:4]), encoding="utf-8")
    build = (
        "--config",
        domain.root / "build.yaml",
        "--datastore.folder",
        tmp_path / "store",
        "--index.factory",
        "Flat",
    )
    run(build_index.build, *build, "--datastore.corpus.path", few)
    args = ("--datastore", tmp_path / "store", "--test.path", few, "--out", tmp_path / "out", "--examples", "0")
    run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args, "--tuning", "null", "--repeats", "1")
    assert "4 of 4 test sources are in the datastore too" in caplog.text
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["tuning"] is None
    assert results["index"]["imbalance_factor"] is None
    assert not (tmp_path / "out" / "cluster_sizes.png").exists()


@needs_comet
def test_comet_scores_both_systems(domain: Domain, tiny: Path, tmp_path: Path):  # noqa: F811
    args = ("--tuning", "null", "--repeats", "1", "--examples", "0", "--out", tmp_path)
    run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args, "--comet", tiny)
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    scores = [results["systems"][name]["comet"] for name in ("base", "knn")]
    assert scores[0] != scores[1]
    assert results["systems"]["base"]["signatures"]["comet"].startswith(f"model:{tiny}|version:")
    assert results["comet"] == {"model": str(tiny), "missing": None}


@needs_comet
def test_an_unreachable_comet_is_noted_and_the_rest_goes_on(
    domain: Domain, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    args = ("--tuning", "null", "--repeats", "1", "--examples", "0", "--out", tmp_path)
    run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args, "--comet", "Unbabel/wmt22-comet-da")
    results = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert results["systems"]["knn"]["comet"] is None
    assert "Unbabel/wmt22-comet-da could not be downloaded" in results["comet"]["missing"]
    assert "no COMET scores: The COMET model Unbabel/wmt22-comet-da could not" in caplog.text
    assert "No COMET scores: The COMET model" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_a_comet_checkpoint_that_does_not_exist_stops_before_anything_is_decoded(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    args = ("--config", domain.root / "evaluate.yaml", "--comet", tmp_path / "no.ckpt", "--out", tmp_path / "out")
    pytest.importorskip("comet")
    expect_error(capsys, evaluate.evaluate, *args, expected="no.ckpt, expected the file of a COMET checkpoint")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_is_no_error(capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run_script(interrupted, [])
    assert exit.value.code == 130
    assert capsys.readouterr().err == ""
