"""Every command in the code blocks of the README and of docs/ is one that the repository takes."""

import re
import runpy
import shlex
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path

import pytest
from jsonargparse import ArgumentError
from script_parsers import ROOT, SCRIPTS, parse

import evaluate
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.decoding import Decoding
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig

PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("dispersion", "indexes", "language_models"))]
PYTHON = re.compile(r"(.*/)?python3?")
LAUNCHER = re.compile(r"(torchrun|srun)( --[\w-]+ \d+)* (python )?")
OPERATORS = {"|", "||", "&&", ";", "&"}


def commands(text: str) -> list[list[str]]:
    """The words of each `python SCRIPT.py …` and `make …` in the fenced code blocks of a Markdown text."""
    found = []
    for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            for words in _simple_commands(LAUNCHER.sub("python ", line.strip().removeprefix("$ "))):
                is_script = len(words) > 1 and PYTHON.fullmatch(words[0]) and words[1].endswith(".py")
                if is_script or words[0] == "make":
                    found.append(words)
    return found


def _simple_commands(line: str) -> list[list[str]]:
    """The words of a shell line by command, without variables before it and redirections behind."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        words = list(lexer)
    except ValueError:  # not a shell line
        return []
    found: list[list[str]] = [[]]
    redirected = False
    for word in words:
        if word in OPERATORS:
            found.append([])
        elif word in ("<", ">", ">>"):
            redirected = True
        elif redirected:
            redirected = False
        elif found[-1] or not re.fullmatch(r"\w+=.*", word):
            found[-1].append(word)
    return [words for words in found if words]


def check(words: list[str], translate_config: Path) -> None:
    """Fail unless the command would be taken; nothing is run.

    Args:
        words: The command.
        translate_config: What stands for files under runs/ that `evaluate.py` writes for `translate.py`.
    """
    if words[0] == "make":
        command = ["make", "--dry-run", *words[1:]]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{shlex.join(words)}: {done.stderr}"
        return
    script, args = words[1], words[2:]
    assert (ROOT / script).exists(), f"{shlex.join(words)}: there is no {script}"
    if script not in SCRIPTS:
        options = {arg.split("=")[0] for arg in args if arg.startswith("--")}
        if options:
            help_text = help_of(script)
            assert all(re.search(rf"{re.escape(option)}\b", help_text) for option in options), f"{options}: {help_text}"
        return
    for number, arg in enumerate(args):
        if arg.startswith("runs/") and args[number - 1] == "--config":
            assert (script, Path(arg).name) == ("translate.py", "translate.yaml"), f"who writes {arg}?"
            args[number] = str(translate_config)
        elif args[number - 1] == "--config":
            args[number] = str(ROOT / arg)
    try:
        parse(script, args)
    except ArgumentError as error:
        pytest.fail(f"{shlex.join(words)}: {error}")


@cache
def help_of(script: str) -> str:
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as out, pytest.raises(SystemExit) as exit:
        patch.chdir(ROOT)
        patch.setattr(sys, "argv", [script, "--help"])
        runpy.run_path(script, run_name="__main__")
    assert exit.value.code == 0
    return out.getvalue()


@pytest.fixture
def translate_config(marian_folder: Path, tmp_path: Path) -> Path:
    """The file that `evaluate.py` writes for `translate.py`."""
    backbone = BackboneConfig(str(marian_folder), device="cpu")
    path = tmp_path / "translate.yaml"
    mixture = MixtureConfig.of(KnnSettings())
    text = evaluate.translate_config(backbone, Path("runs/demo/store"), "index", mixture, Decoding())
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_taken(page: Path, translate_config: Path):
    found = commands(page.read_text(encoding="utf-8"))
    assert len(found) >= 2
    for words in found:
        check(words, translate_config)


def test_commands_are_found_in_code_blocks_only():
    text = """Run `make nothing` and python never.py --x.

```sh
$ make demo  # in 12 minutes
echo "Hallo | Welt" | .venv/bin/python translate.py --config runs/demo/translate.yaml < in.txt > out.txt
OMP_NUM_THREADS=1 python build_index.py \\
  --config "a b.yaml" && make test PYTHON=python3.12
pip install something
```

    make indented

```python
model = make("it's")
```
"""
    assert commands(text) == [
        ["make", "demo"],
        [".venv/bin/python", "translate.py", "--config", "runs/demo/translate.yaml"],
        ["python", "build_index.py", "--config", "a b.yaml"],
        ["make", "test", "PYTHON=python3.12"],
    ]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("make no-such-target", "no-such-target"),
        ("python no_such_script.py --config configs/dispersion/pretix.yaml", "there is no no_such_script.py"),
        ("python train.py fit --config configs/no_such.yaml", "no_such.yaml"),
        ("python train.py --config configs/dispersion/pretix.yaml", "train.py --config"),
        ("python evaluate.py --config configs/demo/evaluate.yaml --no_such_option 1", "no_such_option"),
        ("python evaluate.py --config configs/demo/evaluate.yaml --repeats many", "repeats"),
        ("python evaluate.py --config configs/demo/build.yaml", "evaluate.py"),
        ("python translate.py --config runs/demo/other.yaml", "who writes runs/demo/other.yaml"),
        ("python translate.py --config runs/demo/translate.yaml --explains 3", "explains"),
    ],
)
def test_a_command_that_is_not_taken_fails(command: str, message: str, translate_config: Path):
    with pytest.raises((AssertionError, pytest.fail.Exception), match=re.escape(message)):
        check(shlex.split(command), translate_config)


@pytest.mark.parametrize(
    "command",
    [
        "make demo",
        "python train.py fit --config configs/dispersion/pretix.yaml --trainer.max_steps 10",
        "python translate.py --config runs/demo/translate.yaml --explain 3 --knn.k 4",
    ],
)
def test_a_command_that_is_taken_passes(command: str, translate_config: Path):
    check(shlex.split(command), translate_config)
