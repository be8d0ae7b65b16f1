"""The scripts from end to end, with a tiny model and a tiny corpus that can be learned by heart."""

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from test_comet import needs_comet, offline, tiny  # noqa: F401, the fixtures
from tiny_models import ENGLISH, GERMAN

import build_index
import evaluate
import init_model
import prepare_data
import translate
from lightning_knnmt.backbone import Backbone
from lightning_knnmt.cli import run_script
from lightning_knnmt.datastore.manifest import file_sha256
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.search import KnnSettings, open_search

ROOT = Path(__file__).parents[1]
DECODING = {"beams": 2, "batch_size": 8, "max_new_tokens": 24}


def _write(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))), encoding="utf-8")
    return path


def _run(function: Callable[..., Any], *args: str | Path) -> None:
    run_script(function, [str(arg) for arg in args])


@dataclass
class Domain:
    """What the scripts made: a corpus, a datastore with an index, and results."""

    root: Path
    model: Path

    @property
    def results(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        text = (self.root / "out" / "results.json").read_text(encoding="utf-8")
        return json.loads(text, parse_constant=refuse)

    def sources(self, split: str) -> list[str]:
        lines = (self.root / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["src"] for line in lines]


@pytest.fixture(scope="module")
def domain(marian_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Domain:
    """Prepare, build and evaluate: each sentence comes with many endings, and is translated without them."""
    root = tmp_path_factory.mktemp("domain")
    rows = [(f"{src} {ending}", tgt) for ending in range(12) for src, tgt in zip(GERMAN, ENGLISH, strict=True)]
    (root / "corpus.tsv").write_text("".join(f"{src}\t{tgt}\n" for src, tgt in rows), encoding="utf-8")
    corpus = {
        "class_path": "lightning_knnmt.data.recipes.ParallelFiles",
        "init_args": {"files": [{"path": root / "corpus.tsv"}]},
    }
    splits = {"by": "source", "validation": 8, "test": 8}
    prepare = {"corpus": corpus, "splits": splits, "out": root / "data", "cache": root / "cache"}
    _run(prepare_data.prepare, "--config", _write(root / "prepare.yaml", prepare))
    build = {
        "backbone": {"model": marian_folder, "device": "cpu"},
        "datastore": {"folder": root / "store", "corpus": {"path": root / "data" / "train.jsonl"}},
        "index": {"factory": "IVF4,Flat", "train_points": 200},
    }
    _run(build_index.build, "--config", _write(root / "build.yaml", build))
    evaluation = {
        "backbone": {"model": marian_folder, "device": "cpu"},
        "datastore": root / "store",
        "test": {"path": root / "data" / "test.jsonl"},
        "tuning": {
            "validation": {"path": root / "data" / "validation.jsonl"},
            "grid": {"k": [2, 4], "lambda_": [0.3, 0.9], "nprobe": [1, 4], "finalists": 2},
        },
        "decoding": DECODING,
        "repeats": 2,
        "out": root / "out",
    }
    _run(evaluate.evaluate, "--config", _write(root / "evaluate.yaml", evaluation))
    return Domain(root, marian_folder)


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
    backbone = Backbone(str(domain.model), device="cpu")
    assert settings["model"]["model_sha256"] == backbone.model_fingerprint
    assert settings["model"]["tokenizer_sha256"] == backbone.tokenizer_fingerprint
    assert settings["model"]["dtype"] == "float32"
    assert settings["datastore"]["provenance"]["model_sha256"] == backbone.model_fingerprint
    assert domain.results["index"]["datastore_sha256"] == file_sha256(domain.root / "store" / "manifest.json")
    assert settings["decoding"] == DECODING | {"options": {}}
    assert (settings["repeats"], settings["seed"], domain.results["index"]["seed"]) == (2, 1, 1)
    assert settings["threads"]["torch"] == torch.get_num_threads()
    assert settings["device"] == "cpu"
    assert {"torch", "transformers", "sacrebleu", "python"} <= set(settings["libraries"])
    assert "seed:12345" in domain.results["significance"]["knn"]["bleu"]["signature"]


def test_the_markdown_holds_the_table_and_one_line_of_settings(domain: Domain):
    lines = (domain.root / "out" / "results.md").read_text(encoding="utf-8").splitlines()
    assert [line.split()[1] for line in lines[:4:2]] == ["system", "base"]
    knn = domain.results["settings"]["knn"]
    (settings,) = lines[5:]
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
    _run(build_index.build, "--config", domain.root / "build.yaml")
    assert files() == before
    assert caplog.text.count("already built") == 2
    assert "list sizes: smallest" in caplog.text


def test_a_second_index_adds_to_the_record(domain: Domain):
    path = domain.root / "store" / "build.json"
    before = json.loads(path.read_text(encoding="utf-8"))
    _run(build_index.build, "--config", domain.root / "build.yaml", "--index.factory", "Flat", "--index.name", "flat")
    after = json.loads(path.read_text(encoding="utf-8"))
    assert after["encode"] == before["encode"]
    assert after["indexes"]["index"] == before["indexes"]["index"]
    assert "list_sizes" not in after["indexes"]["flat"]


def _expect_error(
    capsys: pytest.CaptureFixture[str], function: Callable[..., Any], *args: str | Path, expected: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        _run(function, *args)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_evaluate_refuses_the_store_of_another_model(
    domain: Domain, tiny_folder_of: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
):
    other = tiny_folder_of("marian")
    args = ("--config", domain.root / "evaluate.yaml", "--backbone.model", other)
    _expect_error(capsys, evaluate.evaluate, *args, expected=f"does not fit the model {other}: model {domain.model} (")


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
    _expect_error(capsys, evaluate.evaluate, *args, expected=expected)


@pytest.mark.parametrize("split", ["test", "validation"])
def test_evaluate_names_the_empty_split(split: str, domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    option = "--test.path" if split == "test" else "--tuning.validation.path"
    args = ("--config", domain.root / "evaluate.yaml", option, tmp_path / "empty.jsonl", "--out", tmp_path / "out")
    _expect_error(capsys, evaluate.evaluate, *args, expected=f"the {split} split is empty")


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
    _run(build_index.build, *build, "--datastore.corpus.path", few)
    args = ("--datastore", tmp_path / "store", "--test.path", few, "--out", tmp_path / "out", "--examples", "0")
    _run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args, "--tuning", "null", "--repeats", "1")
    assert f"the datastore was built from the test split {few}" in caplog.text
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["tuning"] is None
    assert results["index"]["imbalance_factor"] is None
    assert not (tmp_path / "out" / "cluster_sizes.png").exists()


@needs_comet
def test_comet_scores_both_systems(domain: Domain, tiny: Path, tmp_path: Path):  # noqa: F811
    args = ("--tuning", "null", "--repeats", "1", "--examples", "0", "--out", tmp_path)
    _run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args, "--comet", tiny)
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
    _run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args, "--comet", "Unbabel/wmt22-comet-da")
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
    _expect_error(capsys, evaluate.evaluate, *args, expected="no.ckpt, expected the file of a COMET checkpoint")
    assert not (tmp_path / "out").exists()


class Stdin:
    """A standard input of given bytes."""

    def __init__(self, content: bytes) -> None:
        self.buffer = io.BytesIO(content)


@pytest.fixture
def stdin(monkeypatch: pytest.MonkeyPatch) -> Callable[[bytes], None]:
    """Gives the script a standard input."""
    return lambda content: monkeypatch.setattr(sys, "stdin", Stdin(content))


@pytest.fixture
def expected(domain: Domain) -> Iterator[Callable[[list[str]], list[str]]]:
    """Translations by the tuned settings."""
    backbone = Backbone(str(domain.model), device="cpu")
    with open_search(backbone, domain.root / "store") as search:
        settings = KnnSettings(**domain.results["settings"]["knn"])
        yield lambda sources: search.translator(settings, Decoding(**DECODING)).translate(sources).texts


def test_translate_takes_the_config_that_evaluate_wrote_and_gives_its_translations(
    domain: Domain,
    stdin: Callable[[bytes], None],
    expected: Callable[[list[str]], list[str]],
    capfdbinary: pytest.CaptureFixture[bytes],
):
    sources = domain.sources("test")
    stdin("".join(f"{source}\n" for source in sources).encode())
    _run(translate.translate, "--config", domain.root / "out" / "translate.yaml")
    lines = capfdbinary.readouterr().out.decode().splitlines()
    assert lines == expected(sources)
    assert len(set(lines)) > 2


def test_empty_lines_stay_and_carriage_returns_go(
    domain: Domain,
    stdin: Callable[[bytes], None],
    expected: Callable[[list[str]], list[str]],
    capfdbinary: pytest.CaptureFixture[bytes],
):
    stdin(f"\n{GERMAN[0]} 3\r\n  \n\n{GERMAN[1]} 2".encode())
    _run(translate.translate, "--config", domain.root / "out" / "translate.yaml", "--block", "2")
    first, second = expected([f"{GERMAN[0]} 3", f"{GERMAN[1]} 2"])
    assert capfdbinary.readouterr().out.decode() == f"\n{first}\n\n\n{second}\n"


def test_no_input_gives_no_output(domain: Domain, stdin: Callable[[bytes], None], capfdbinary: Any):
    stdin(b"")
    _run(translate.translate, "--config", domain.root / "out" / "translate.yaml")
    assert capfdbinary.readouterr().out == b""


def test_without_a_datastore_it_is_the_plain_model_from_file_to_file(domain: Domain, tmp_path: Path):
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in GERMAN), encoding="utf-8")
    args = ("--backbone.model", domain.model, "--backbone.device", "cpu", "--decoding.max_new_tokens", "9")
    _run(translate.translate, *args, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    plain = Translator(Backbone(str(domain.model), device="cpu"), Decoding(max_new_tokens=9)).translate(GERMAN).texts
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == plain


def test_explain_lists_neighbors_under_each_token(
    domain: Domain,
    stdin: Callable[[bytes], None],
    expected: Callable[[list[str]], list[str]],
    capfdbinary: pytest.CaptureFixture[bytes],
):
    source = domain.sources("test")[0]
    stdin(f"{source}\n\n".encode())
    _run(translate.translate, "--config", domain.root / "out" / "translate.yaml", "--explain", "2")
    text, *tokens, last = capfdbinary.readouterr().out.decode().splitlines()
    assert [text] == expected([source])
    assert last == ""
    assert len(tokens) % 3 == 0
    assert all(line.startswith("  ") and not line.startswith("   ") for line in tokens[::3])
    assert all("  ⇐  " in line and "[" in line for line in tokens[1::3] + tokens[2::3])
    assert "</s>" in tokens[-3]


def test_a_terminal_is_answered_line_by_line(
    domain: Domain, monkeypatch: pytest.MonkeyPatch, capfdbinary: pytest.CaptureFixture[bytes]
):
    written: list[int] = []

    class Terminal(io.BytesIO):
        def isatty(self) -> bool:
            return True

        def readline(self, size: int | None = -1) -> bytes:
            written.append(capfdbinary.readouterr().out.count(b"\n"))
            return super().readline(size)

        def __next__(self) -> bytes:
            if line := self.readline():
                return line
            raise StopIteration

    stream = Stdin(b"")
    stream.buffer = Terminal("".join(f"{line}\n" for line in GERMAN[:3]).encode())
    monkeypatch.setattr(sys, "stdin", stream)
    _run(translate.translate, "--config", domain.root / "out" / "translate.yaml")
    assert written == [0, 1, 1, 1]


def test_bytes_that_are_not_utf8_are_named_by_line(
    domain: Domain, stdin: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
):
    stdin("Öffnen\n".encode() + "Öffnen\n".encode("latin1"))
    args = ("--config", domain.root / "out" / "translate.yaml")
    _expect_error(capsys, translate.translate, *args, expected="standard input, line 2: byte 1 is 0xd6, expected UTF-8")


def test_options_without_sense_are_errors(domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = ("--backbone.model", domain.model, "--backbone.device", "cpu")
    tuned = ("--config", domain.root / "out" / "translate.yaml")
    file = tmp_path / "text.txt"
    file.write_text("Öffnen\n", encoding="utf-8")
    for args, expected in (
        ((*plain, "--explain", "2"), "explain is 2, which shows stored contexts, but no datastore is given"),
        ((*plain, "--explain", "-1"), "explain is -1, expected 0 or more"),
        ((*plain, "--block", "0"), "block is 0, expected 1 or more"),
        ((*plain, "--knn.k", "0"), "k is 0, expected 1 or more"),
        ((*plain, "--bogus", "0"), "unrecognized arguments: --bogus"),
        ((*plain, "--input", file, "--output", file), "the same file as input"),
        ((*plain, "--input", tmp_path / "none.txt"), "No such file or directory"),
        ((*plain, "--datastore", tmp_path), "holds no datastore"),
        ((*tuned, "--index", "other"), "has no index called 'other'"),
        (("--backbone.model", tmp_path / "nowhere"), "nowhere"),
    ):
        _expect_error(capsys, translate.translate, *args, expected=expected)
    assert file.read_text(encoding="utf-8") == "Öffnen\n"


def test_a_debugging_user_gets_the_traceback(domain: Domain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="block is 0"):
        _run(translate.translate, "--backbone.model", domain.model, "--backbone.device", "cpu", "--block", "0")


def test_ctrl_c_is_no_error(capsys: pytest.CaptureFixture[str]):
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        run_script(interrupted, [])
    assert exit.value.code == 130
    assert capsys.readouterr().err == ""


def test_in_a_pipe_only_translations_reach_stdout_and_a_closed_pipe_is_quiet(domain: Domain):
    command = [sys.executable, "translate.py", "--config", domain.root / "out" / "translate.yaml", "--block", "1"]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ
    ) as process:
        assert process.stdin and process.stdout and process.stderr
        process.stdin.write("".join(f"{line}\n" for line in GERMAN * 4).encode())
        process.stdin.close()
        assert process.stdout.readline().decode().strip() in ENGLISH
        process.stdout.close()
        errors = process.stderr.read().decode()
        assert process.wait(timeout=60) == 141
    assert "Traceback" not in errors
    assert "BrokenPipe" not in errors


def test_init_model_makes_a_model_that_decodes(domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    size = {"vocabulary": 100, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "heads": 2, "ffn": 16}
    config = {"train": domain.root / "data" / "train.jsonl", "out": tmp_path / "model", "size": size}
    _run(init_model.init, "--config", _write(tmp_path / "init.yaml", config))
    backbone = Backbone(str(tmp_path / "model"), device="cpu")
    assert backbone.key_size == 16
    assert len(Translator(backbone, Decoding(max_new_tokens=4)).translate(GERMAN).texts) == len(GERMAN)
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    args = ("--config", tmp_path / "init.yaml", "--train", tmp_path / "empty.jsonl")
    _expect_error(capsys, init_model.init, *args, expected="empty.jsonl, which is empty; expected one pair or more")
