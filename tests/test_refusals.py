"""Wrong options are refused before work begins, in few words, and leave nothing behind."""

from pathlib import Path
from typing import IO

import pytest
from script_runs import Domain, expect_error, run

import build_index
import evaluate
import translate
from lightning_knnmt.storage import lock
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.lock import only_writer


def build_args(domain: Domain, folder: Path) -> list[object]:
    return ["--config", domain.root / "build.yaml", "--datastore.folder", folder]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--index.factory", "IVF0,Flat"), "factory is 'IVF0,Flat' with 0 in it"),
        (("--index.factory", "Flat," * 20_000), "expected 256 characters or fewer"),
        (("--index.seed", "-1"), "seed is -1, expected 0 or more"),
        (("--datastore.corpus.path", "nowhere.tsv"), "path is nowhere.tsv, which does not exist"),
        (("--datastore.folder", "/dev/null/store"), "folder is /dev/null/store, where /dev/null is no folder"),
    ],
)
def test_a_build_is_refused_before_the_model_is_loaded(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("lightning_knnmt.backbone.families.model_class_of", lambda _: pytest.fail("it was loaded"))
    args = [*build_args(domain, tmp_path / "store"), *options]
    expect_error(capsys, build_index.build, *args, expected=message)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize("factory", ["Nonsense", "PQ7", "IVF4,PQ1000"])
def test_a_factory_string_that_does_not_fit_is_refused_before_the_corpus_is_encoded(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], factory: str
) -> None:
    args = [*build_args(domain, tmp_path / "store"), "--index.factory", factory]
    expect_error(capsys, build_index.build, *args, expected=f"factory is '{factory}'")  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(("content", "message"), [("", "which has no pairs"), ("only one column\n", "missing column")])
def test_a_refused_corpus_leaves_no_folder(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str, message: str
) -> None:
    (tmp_path / "c.tsv").write_text(content)
    args = [*build_args(domain, tmp_path / "store"), "--datastore.corpus.path", tmp_path / "c.tsv"]
    expect_error(capsys, build_index.build, *args, expected=message)  # type: ignore[arg-type]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tuning.grid.k", "[0]"), "k is [0], expected 1 or more each"),
        (("--tuning.grid.k", "x"), "grid.k"),
        (("--tuning.grid.nope", "3"), "nope"),
        (("--knn.k", "99999999999"), "k is 99999999999, expected 65536 or less"),
        (("--repeats", "0"), "repeats is 0, expected 1 or more"),
        (("--decoding.max_new_tokens", "0"), "max_new_tokens is 0, expected 1 or more"),
        (("--no_such_option", "0"), "--no_such_option"),
    ],
)
def test_the_reason_is_not_buried(
    domain: Domain, capsys: pytest.CaptureFixture[str], options: tuple[str, str], message: str
) -> None:
    with pytest.raises(SystemExit) as exit:
        run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *options)
    said = capsys.readouterr().err
    assert exit.value.code == 2 and message in said
    assert len(said.splitlines()) <= 6 and "Namespace(" not in said


def test_every_system_and_repeat_is_reported(domain: Domain, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = ("--tuning", "null", "--repeats", "1", "--examples", "0", "--out", tmp_path)
    with caplog.at_level("INFO"):
        run(evaluate.evaluate, "--config", domain.root / "evaluate.yaml", *args)
    for name in ("base", "knn"):
        assert f"{name}, warm-up: " in caplog.text and f"{name}, repeat 1 of 1: " in caplog.text


def test_a_wrong_device_is_an_error_in_a_line(domain: Domain, capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--backbone.model", domain.model, "--backbone.device", "xyz")
    expect_error(capsys, translate.translate, *args, expected="device is 'xyz', expected one that is here")


def test_a_folder_that_a_lock_made_goes_with_it_and_no_stale_lock_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "store"
    with only_writer(folder):
        assert (folder / "writer.lock").exists()
    assert not folder.exists()

    take = lock._lock

    def take_late(file: IO[bytes], path: Path, shared: bool) -> bool:
        path.unlink()  # by one who was first, after this one had opened the file
        return take(file, path, shared)

    monkeypatch.setattr(lock, "_lock", take_late)
    with pytest.raises(DatastoreError, match="was removed by another process just now"), only_writer(folder):
        pass
