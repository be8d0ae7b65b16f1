"""Model folders from strangers: no code of theirs runs, and what is wrong is said in a line."""

import io
import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
from script_runs import expect_error

import translate
from lightning_knnmt.backbone.config import load_model


@pytest.fixture
def hostile(marian_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model folder with Python beside it, and a text to translate that begins with y."""
    folder = tmp_path / "model"
    shutil.copytree(marian_folder, folder)
    (folder / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        "from transformers import MarianConfig, MarianTokenizer, MarianMTModel\n"
        "class C(MarianConfig): model_type = 'strange'\nclass T(MarianTokenizer): pass\nclass M(MarianMTModel): pass\n"
    )
    text = io.TextIOWrapper(io.BytesIO(b"y\ny\ny\n"))
    monkeypatch.setattr(sys, "stdin", text)
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    return folder


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"model_type": "strange", "auto_map": {"AutoConfig": "evil.C"}}),
        ("config.json", {"auto_map": {"AutoModelForSeq2SeqLM": "evil.M"}}),
        ("tokenizer_config.json", {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["evil.T", None]}}),
    ],
)
def test_code_in_a_model_folder_is_refused_and_nothing_of_the_text_is_read(
    hostile: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, changes: dict[str, object]
) -> None:
    path = hostile / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    expect_error(
        capsys, translate.translate, "--backbone.model", hostile, expected=f"has an auto_map in its {file}, which asks"
    )
    assert sys.stdin.readline() == "y\n"
    assert not (tmp_path / "ran").exists()


def test_a_model_that_is_a_pickle_of_other_things_is_refused(hostile: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.touch, (tmp_path / "ran",)

    for weights in hostile.glob("*.safetensors"):
        weights.unlink()
    (hostile / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Evil()}))
    with pytest.raises(ValueError, match=r"the weights of model .* cannot be read"):
        load_model(str(hostile), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_refused(hostile: Path) -> None:
    (weights,) = hostile.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"the weights of model .* cannot be read"):
        load_model(str(hostile), device="cpu")


@pytest.mark.parametrize("device", ["xyz", "cuda:99", "cpu:x", ""])
def test_a_device_that_is_not_here_is_named_before_the_weights_are_read(
    marian_folder: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    monkeypatch.setattr("lightning_knnmt.backbone.seq2seq.read_weights", lambda *_: pytest.fail("it was read"))
    with pytest.raises(ValueError, match=f"device is {device!r}, expected one that is here: auto, cpu"):
        load_model(str(marian_folder), device=device)
