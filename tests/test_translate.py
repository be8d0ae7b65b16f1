"""translate.py with what evaluate.py left: lines in, lines out, and errors that say what to do."""

import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from script_runs import DECODING, ROOT, Domain, expect_error, run
from test_comet import offline  # noqa: F401, a fixture for every test
from tiny_models import ENGLISH, GERMAN

import translate
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import open_memory


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
    backbone = load_model(str(domain.model), device="cpu")
    with open_memory(domain.root / "store") as memory:
        mixture = KnnSettings(**domain.results["settings"]["knn"]).open(backbone, memory)
        yield lambda sources: Translator(backbone, mixture, Decoding(**DECODING)).translate(sources).texts


def test_translate_takes_the_config_that_evaluate_wrote_and_gives_its_translations(
    domain: Domain,
    stdin: Callable[[bytes], None],
    expected: Callable[[list[str]], list[str]],
    capfdbinary: pytest.CaptureFixture[bytes],
):
    sources = domain.sources("test")
    stdin("".join(f"{source}\n" for source in sources).encode())
    run(translate.translate, "--config", domain.root / "out" / "translate.yaml")
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
    run(translate.translate, "--config", domain.root / "out" / "translate.yaml", "--block", "2")
    first, second = expected([f"{GERMAN[0]} 3", f"{GERMAN[1]} 2"])
    assert capfdbinary.readouterr().out.decode() == f"\n{first}\n\n\n{second}\n"


def test_no_input_gives_no_output(domain: Domain, stdin: Callable[[bytes], None], capfdbinary: Any):
    stdin(b"")
    run(translate.translate, "--config", domain.root / "out" / "translate.yaml")
    assert capfdbinary.readouterr().out == b""


def test_without_a_datastore_it_is_the_plain_model_from_file_to_file(domain: Domain, tmp_path: Path):
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in GERMAN), encoding="utf-8")
    args = ("--backbone.model", domain.model, "--backbone.device", "cpu", "--decoding.max_new_tokens", "9")
    run(translate.translate, *args, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    backbone = load_model(str(domain.model), device="cpu")
    plain = Translator(backbone, decoding=Decoding(max_new_tokens=9)).translate(GERMAN).texts
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == plain


def test_explain_lists_neighbors_under_each_token(
    domain: Domain,
    stdin: Callable[[bytes], None],
    expected: Callable[[list[str]], list[str]],
    capfdbinary: pytest.CaptureFixture[bytes],
):
    source = domain.sources("test")[0]
    stdin(f"{source}\n\n".encode())
    run(translate.translate, "--config", domain.root / "out" / "translate.yaml", "--explain", "2")
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
    run(translate.translate, "--config", domain.root / "out" / "translate.yaml")
    assert written == [0, 1, 1, 1]


def test_bytes_that_are_not_utf8_are_named_by_line(
    domain: Domain, stdin: Callable[[bytes], None], capsys: pytest.CaptureFixture[str]
):
    stdin("Öffnen\n".encode() + "Öffnen\n".encode("latin1"))
    args = ("--config", domain.root / "out" / "translate.yaml")
    expect_error(capsys, translate.translate, *args, expected="standard input, line 2: byte 1 is 0xd6, expected UTF-8")


def test_options_without_sense_are_errors(domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    plain = ("--backbone.model", domain.model, "--backbone.device", "cpu", "--decoding.max_new_tokens", "9")
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
        ((*plain, "--input", tmp_path / "none.txt"), "none.txt, which does not exist, expected a text file"),
        ((*plain, "--datastore", tmp_path), "holds no datastore"),
        ((*tuned, "--index", "other"), "has no index called 'other'"),
        (("--backbone.model", tmp_path / "nowhere"), "nowhere"),
    ):
        expect_error(capsys, translate.translate, *args, expected=expected)
    assert file.read_text(encoding="utf-8") == "Öffnen\n"


def test_a_debugging_user_gets_the_traceback(domain: Domain, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="block is 0"):
        run(translate.translate, "--backbone.model", domain.model, "--backbone.device", "cpu", "--block", "0")


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
