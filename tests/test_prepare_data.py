"""prepare_data.py from end to end, as a process of its own, and the configurations that it is given."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

import prepare_data
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.splits import read_split

ROOT = Path(prepare_data.__file__).parent
CONFIGS = sorted((ROOT / "configs" / "data").glob("*.yaml"))

TMX = """<?xml version="1.0"?><tmx version="1.4"><header/><body>
{units}
<tu><tuv xml:lang="de"><seg>Nur deutsch</seg></tuv></tu>
</body></tmx>
"""
UNIT = '<tu><tuv xml:lang="de-DE"><seg>{src}</seg></tuv><tuv xml:lang="en"><seg>{tgt}</seg></tuv></tu>'


def main(*args: object) -> None:
    run_script(prepare_data.prepare, [str(arg) for arg in args])


def run(*args: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "prepare_data.py"), *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A configuration for a TMX file of 20 pairs and two plain-text files of 12, some of them unclean."""
    units = [UNIT.format(src=f"Satz Nummer {n} bitte &lt;b&gt;", tgt=f"sentence number {n} please") for n in range(20)]
    (tmp_path / "memory.tmx").write_text(TMX.format(units="\n".join(units)), encoding="utf-8")
    src = [f"Zeile {n} der Anleitung" for n in range(8)] + ["", "12", "leave as is", "Zeile 0 der Anleitung"]
    tgt = [f"line {n} of the manual" for n in range(8)] + ["empty", "12", "leave as is", "line 0 of the manual"]
    (tmp_path / "lines.de").write_text("\n".join(src), encoding="utf-8")
    (tmp_path / "lines.en").write_text("\n".join(tgt), encoding="utf-8")
    options = {
        "corpus": {
            "class_path": "lightning_knnmt.data.recipes.ParallelFiles",
            "init_args": {
                "files": [
                    {"path": "memory.tmx", "malformed": "skip"},
                    {"path": "lines.de", "tgt_path": "lines.en", "malformed": "skip"},
                ]
            },
        },
        "cleaning": {"max_length_ratio": 4.0},
        "splits": {"by": "source", "validation": 3, "test": 4, "min_words": 2},
        "out": "out",
    }
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(options), encoding="utf-8")
    return file


def test_own_files_become_splits_and_everything_dropped_is_counted(config: Path) -> None:
    result = run("--config", config.name, cwd=config.parent)
    assert result.returncode == 0, result.stderr
    out = config.parent / "out"
    facts = json.loads((out / "splits.json").read_text(encoding="utf-8"))
    splits = {name: read_split(out / f"{name}.jsonl") for name in ("train", "validation", "test")}
    assert {name: len(pairs) for name, pairs in splits.items()} == {"train": 21, "validation": 3, "test": 4}
    expected = {Pair(f"Satz Nummer {n} bitte <b>", f"sentence number {n} please") for n in range(20)}
    expected = {Pair(pair.src.removesuffix(" <b>"), pair.tgt) for pair in expected}
    expected |= {Pair(f"Zeile {n} der Anleitung", f"line {n} of the manual") for n in range(8)}
    assert {pair for pairs in splits.values() for pair in pairs} == expected
    assert facts["read"] == 31
    assert facts["dropped"] == {
        "missing language": 1,
        "empty side": 1,
        "no letters": 1,
        "not translated": 1,
        "repeated": 1,
    }
    assert facts["corpus"]["class"] == "ParallelFiles"
    assert "memory.tmx" in facts["corpus"]["files"]
    for words in (
        "read 31 pairs, skipped 2 (missing language: 1, empty side: 1)",
        "cleaning dropped 2 (no letters: 1, not translated: 1)",
        "splitting dropped 1 (repeated: 1)",
    ):
        assert words in result.stderr


def test_excluded_corpora_share_no_text_with_the_written_one(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    Path("other.jsonl").write_text('{"src": "zeile  3 der ANLEITUNG", "tgt": "x"}\n', encoding="utf-8")
    main("--config", config, "--exclude", '["other.jsonl"]')
    assert json.loads(Path("out/splits.json").read_text(encoding="utf-8"))["dropped"]["excluded"] == 1
    splits = [Path(f"out/{name}.jsonl").read_text(encoding="utf-8") for name in ("train", "validation", "test")]
    assert ["Zeile 3" in split for split in splits] == [False, False, False]
    assert any("Zeile 4" in split for split in splits)


def test_a_second_run_writes_the_same_bytes(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(config.parent)
    main("--config", config)
    main("--config", config, "--out", "again")
    first, second = ({file.name: file.read_bytes() for file in Path(out).iterdir()} for out in ("out", "again"))
    assert first == second
    assert len(first) == 4


def test_help_names_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main("--help")
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    options = ("--corpus", "--splits.validation", "--splits.min_words", "--out", "--cleaning", "--exclude", "--cache")
    assert [option for option in options if option not in shown] == []


def failure(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a failing run says; scripts end with a message as their exit code, or the parser prints it."""
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code not in (0, None)
    return f"{capsys.readouterr().err}\n{stop.value.code}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--corpus", "lightning_knnmt.data.recipes.Nope"], "'lightning_knnmt.data.recipes' has no attribute 'Nope'"),
        (["--splits.by", "page"], 'Parser key "splits.by"'),
        (["--splits.validation", "300"], "validation + test is 304 units, but only 28 source units"),
        (["--exclude", '["none.jsonl"]'], "none.jsonl does not exist; write it with prepare_data.py"),
        (["--cleaning.max_words", "0"], "max_words is 0, expected 1 or more"),
    ],
)
def test_a_wrong_option_is_named_and_nothing_is_written(
    config: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    args: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(config.parent)
    assert message in failure(capsys, "--config", config, *args)
    assert not Path("out").exists()


@pytest.mark.parametrize("option", ["corpus", "splits", "out"])
def test_a_missing_option_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    monkeypatch.chdir(config.parent)
    options = yaml.safe_load(config.read_text(encoding="utf-8"))
    del options[option]
    config.write_text(yaml.safe_dump(options), encoding="utf-8")
    words = failure(capsys, "--config", config)
    assert option in words[words.index("error:") :]


def test_a_missing_file_is_named(
    config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(config.parent)
    Path("lines.en").unlink()
    words = failure(capsys, "--config", config)
    assert "tgt_path is lines.en, which does not exist, expected a corpus file" in words


def test_a_damaged_download_ends_the_process_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "pretix-2026.8.0-py3-none-any.whl").write_bytes(b"half")
    pretix = ROOT / "configs" / "data" / "pretix.yaml"
    result = run("--config", pretix, "--out", "out", "--cache", "cache", cwd=tmp_path)
    assert result.returncode == 2
    assert "pretix-2026.8.0-py3-none-any.whl is damaged or incomplete" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_there_are_configs() -> None:
    assert {"libreoffice_help", "pretix"} <= {file.stem for file in CONFIGS}


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_config_parses_and_its_classes_are_made(file: Path) -> None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(prepare_data.prepare, as_positional=False)
    made = parser.instantiate_classes(parser.parse_args(["--config", str(file)]))
    raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    assert f"{type(made.corpus).__module__}.{type(made.corpus).__name__}" == raw["corpus"]["class_path"]
    assert (made.splits.validation, made.splits.test) == (raw["splits"]["validation"], raw["splits"]["test"])
    assert (made.cleaning is None) == ("cleaning" not in raw)  # documents are not cleaned as pairs are
    if made.cleaning is not None:
        assert made.cleaning.max_length_ratio == raw["cleaning"]["max_length_ratio"]
    assert (made.windows is None) == ("windows" not in raw)
    assert str(made.out) == f"data/{file.stem}"
