"""What is there already is kept, refused or replaced as asked; links are not followed; a file is whole or as it was."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from script_runs import Domain, expect_error, run
from tiny_models import GERMAN

import evaluate
import import_model
import prepare_data
import translate
from lightning_knnmt.decoding import Translator
from lightning_knnmt.storage.files import write_json, write_text


@pytest.fixture
def mine(tmp_path: Path) -> Path:
    """A file of the user's."""
    (tmp_path / "mine").write_text("precious")
    return tmp_path / "mine"


# ---- links


@pytest.mark.parametrize("hard", [False, True])
def test_results_are_not_written_through_a_link(mine: Path, hard: bool) -> None:
    for name in ("build.json", "results.json", "translate.yaml"):
        partial = mine.with_name(f"{name}.partial")
        partial.hardlink_to(mine) if hard else partial.symlink_to(mine)
        write_json(mine.with_name(name), {"a": 1}) if name.endswith("json") else write_text(mine.with_name(name), "a")
        assert mine.with_name(name).read_text() != mine.read_text() == "precious"
        assert not partial.exists()


def test_evaluate_and_build_write_with_the_one_function() -> None:
    import build_index

    assert evaluate.write_json is write_json is build_index.write_json
    assert evaluate.write_text is write_text


# ---- what is there


def test_evaluate_keeps_results_that_are_there_unless_they_are_to_be_replaced(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--config", domain.root / "evaluate.yaml", "--tuning", "null", "--repeats", "1", "--examples", "0")
    (tmp_path / "results.json").write_text("old")
    monkeypatch.setattr(evaluate, "read_pairs", lambda *_: pytest.fail("work has begun"))
    expected = f"out is {tmp_path}/results.json, which is there already; name another, or give --overwrite true"
    expect_error(capsys, evaluate.evaluate, *args, "--out", tmp_path, "--overwrite", "false", expected=expected)
    assert (tmp_path / "results.json").read_text() == "old"
    monkeypatch.undo()
    run(evaluate.evaluate, *args, "--out", tmp_path, "--overwrite", "true")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))["systems"]


@pytest.mark.parametrize("script", ["evaluate", "prepare", "import"])
@pytest.mark.parametrize("below", [False, True])
def test_a_file_where_a_folder_is_expected_is_refused_before_anything_is_done(
    domain: Domain, mine: Path, capsys: pytest.CaptureFixture[str], script: str, below: bool
) -> None:
    out = mine / "deep" / "out" if below else mine
    function, args = {
        "evaluate": (evaluate.evaluate, ["--config", domain.root / "evaluate.yaml", "--overwrite", "true"]),
        "prepare": (prepare_data.prepare, ["--config", domain.root / "prepare.yaml", "--overwrite", "true"]),
        "import": (import_model.import_model, ["--folder", mine.parent, "--overwrite", "true"]),
    }[script]
    expect_error(capsys, function, *args, "--out", out, expected=f"out is {out}, where {mine} is no folder, expected a")
    assert mine.read_text() == "precious"


def test_prepared_splits_are_kept_or_refused_or_replaced(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("--config", domain.root / "prepare.yaml", "--out", tmp_path / "out")
    run(prepare_data.prepare, *args)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    run(prepare_data.prepare, *args)
    with monkeypatch.context() as reading:
        reading.setattr(prepare_data, "ReadReport", lambda: pytest.fail("the corpus is read"))
        expected = "which holds splits of another config; name another folder, or give --overwrite true"
        expect_error(capsys, prepare_data.prepare, *args, "--splits.seed", "2", expected=expected)
    cleaned = ("--cleaning.max_words", "7")
    expected = "which is there already; name another, or give --overwrite true"
    expect_error(capsys, prepare_data.prepare, *args, *cleaned, expected=expected)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    run(prepare_data.prepare, *args, "--splits.seed", "2", "--overwrite", "true")
    assert (tmp_path / "out" / "test.jsonl").read_bytes() != before["test.jsonl"]


def test_importing_a_model_replaces_models_only(mine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--folder", mine.parent, "--out", mine.parent, "--overwrite", "true")
    expect_error(
        capsys, import_model.import_model, *args, expected="which holds no model, expected a new folder or one"
    )
    assert mine.read_text() == "precious"


# ---- translate.py --output


@pytest.fixture
def plain(domain: Domain, tmp_path: Path) -> list[Any]:
    """Options to translate two sentences into out.txt, one at a time."""
    (tmp_path / "in.txt").write_text("\n".join(GERMAN[:2]) + "\n", encoding="utf-8")
    model = ("--backbone.model", domain.model, "--backbone.device", "cpu", "--decoding.max_new_tokens", "9")
    return [*model, "--block", "1", "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt"]


def test_an_output_that_is_there_stays_until_another_is_whole(
    plain: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out.txt"
    out.write_text("old")
    expect_error(capsys, translate.translate, *plain, expected=f"output is {out}, which is there already")
    original, calls = Translator.translate, []

    def fails_at_the_second(self: Translator, texts: list[str]) -> Any:
        calls.append(texts)
        if len(calls) == 2:
            raise ValueError("stopped")
        return original(self, texts)

    monkeypatch.setattr(Translator, "translate", fails_at_the_second)
    expect_error(capsys, translate.translate, *plain, "--overwrite", "true", expected="stopped")
    assert out.read_text() == "old"
    assert len((tmp_path / "out.txt.partial").read_text().splitlines()) == 1  # hours of work may be in it
    monkeypatch.undo()
    run(translate.translate, *plain, "--overwrite", "true")
    assert len(out.read_text(encoding="utf-8").splitlines()) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.txt", "out.txt"]


def test_a_wrong_device_leaves_the_output_alone(
    plain: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out.txt").write_text("old")
    wrong = ("--overwrite", "true", "--backbone.device", "xyz")
    expect_error(capsys, translate.translate, *plain, *wrong, expected="device is 'xyz', expected one that is here")
    assert (tmp_path / "out.txt").read_text() == "old"


def test_a_device_as_output_stays_one(plain: list[Any], tmp_path: Path) -> None:
    run(translate.translate, *plain[:-1], "/dev/null")
    assert Path("/dev/null").is_char_device()


@pytest.mark.parametrize("name", ["in.tsv", "in.jsonl.gz", "in.tmx", "in.xlf", "in.csv", "in.po"])
def test_a_corpus_is_not_translated_as_text(
    plain: list[Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    (tmp_path / name).write_text("Hallo\tHello\n")
    plain[plain.index("--input") + 1] = tmp_path / name
    expect_error(capsys, translate.translate, *plain, expected=f"input is {tmp_path / name}, a corpus in ")
    assert not (tmp_path / "out.txt").exists()


def test_utf_16_and_gzip_are_translated(plain: list[Any], tmp_path: Path) -> None:
    run(translate.translate, *plain)
    expected = (tmp_path / "out.txt").read_bytes()
    (tmp_path / "in.txt").write_bytes(gzip.compress((tmp_path / "in.txt").read_text("utf-8").encode("utf-16")))
    run(translate.translate, *plain, "--overwrite", "true")
    assert (tmp_path / "out.txt").read_bytes() == expected
