"""The training configurations, their variants and the sweep are read, and train."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI
from training_runs import PAIRS, ROOT, column, data_options, logged, logits_of
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import build_index
import train
from lightning_knnmt.backbone.config import load_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI.s args parameter", "ignore:Found .* in eval mode", "ignore:.*tied layer"
)

FolderOf = Callable[[str], Path]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small corpus of several batches."""
    return data_options(tmp_path_factory.mktemp("data"), PAIRS[:40], PAIRS[40:])


def parsed(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the command line reads, without loading a model."""
    configs = []
    monkeypatch.setattr(LightningCLI, "instantiate_classes", lambda self: configs.append(self.config[self.subcommand]))
    monkeypatch.setattr(LightningCLI, "_run_subcommand", lambda self, subcommand: None)
    train.main(arguments)
    return configs[0]


SHARED = ROOT / "configs" / "training.yaml"
DISPERSION_CONFIGS = sorted((ROOT / "configs" / "dispersion").glob("*.yaml"))


def variants() -> list[list[str]]:
    """The options of each variant that the comments of the shared configuration tell of."""
    found = re.findall(r"^#   [^\n-][^\n]*?  +(--[^(\n]+)", SHARED.read_text(), re.MULTILINE)
    return [line.split() for line in found]


@pytest.mark.parametrize("path", DISPERSION_CONFIGS, ids=lambda path: path.stem)
def test_dispersion_configurations_and_their_variants_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(["fit", "--config", str(path)], monkeypatch)
    assert config.model.trainable == "last_block" and config.model.gamma == 1
    assert config.model.schedule.max_steps == config.trainer.max_steps <= 5000
    assert len(variants()) == 10
    for options in variants():
        other = parsed(["fit", "--config", str(path), *options], monkeypatch)
        assert other != config or (config.model.label_smoothing == 0 and "label_smoothing" in options[0]), options


@pytest.mark.parametrize("path", DISPERSION_CONFIGS, ids=lambda path: path.stem)
def test_no_value_stands_twice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own, shared = (yaml.safe_load(file.read_text()) for file in (path, SHARED))
    text = path.read_text().partition("model:\n")[2]
    assert text.count("max_steps: ") == text.count("runs/dispersion/") == 1
    repeated = [(section, name) for section in own for name in own[section] if name in shared.get(section, {})]
    assert repeated == []
    config = parsed(["fit", "--config", str(path)], monkeypatch)
    folder = config.trainer.default_root_dir
    assert (str(config.export.folder), str(config.checkpoint.dirpath)) == (f"{folder}/model", f"{folder}/checkpoints")
    assert config.checkpoint.save_last and config.trainer.gradient_clip_val == 1


def test_every_regulariser_is_named_as_a_variant() -> None:
    from lightning_knnmt import dispersion

    concrete = [
        name for name, value in vars(dispersion).items()
        if isinstance(value, type) and issubclass(value, dispersion.Dispersion) and not value.__abstractmethods__
    ]  # fmt: skip
    assert len(concrete) == 9
    named = SHARED.read_text() + (ROOT / "configs" / "dispersion" / "pretix.yaml").read_text()
    assert [name for name in concrete if name not in named] == []


# NLLB's codes of the languages that its configuration names
MODELS = {"wmt16_ro_en": ("nllb", ("--model.backbone.src_lang=deu_Latn",)), "wmt19_de_en": ("fsmt", ())}


@pytest.mark.parametrize("path", DISPERSION_CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_trains_two_steps_as_shipped_but_for_model_data_and_lists(
    path: Path, tiny_folder_of: FolderOf, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name, languages = MODELS.get(path.stem, ("marian", ()))
    model = tiny_folder_of(name)
    config = yaml.safe_load(path.read_text())
    for callback in [config["trainer"].get("callbacks")]:
        if callback is not None:
            callback["init_args"]["nlist"] = 4
    if config["model"]["schedule"].get("decay_steps"):
        config["model"]["schedule"]["decay_steps"] = 1
    config["model"]["schedule"]["warmup_steps"] = 1
    Path("own.yaml").write_text(yaml.safe_dump(config))
    if path.stem == "stored_states":
        data = _stored(model, data)
    short = ("--trainer.max_steps=2", "--trainer.accelerator=cpu", "--data.max_tokens=60")
    train.main(["fit", "--config=own.yaml", f"--model.backbone.model={model}", *languages, *data, *short])
    folder = Path(config["trainer"]["default_root_dir"])
    options = {"src_lang": "deu_Latn", "tgt_lang": "eng_Latn"} if name == "nllb" else {}
    before, after = (load_model(str(made), device="cpu", **options) for made in (model, folder / "model"))
    assert not torch.equal(logits_of(after), logits_of(before))
    rows = logged(folder / "lightning_logs" / "version_0")
    assert len(column(rows, "val/loss")) == 1
    if path in DISPERSION_CONFIGS:
        assert len(column(rows, "val/imbalance_factor")) == 1
        assert list(folder.rglob("val_list_sizes_*.png"))
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2 and last["hyper_parameters"]["backbone"]["model"] == str(model)


def _stored(model: Path, data: list[str]) -> list[str]:
    """The states of the splits in place of the splits."""
    stored = []
    for option in data:
        name, _, corpus = option.partition("=")
        folder = Path(name.removeprefix("--data."))
        options = ["--datastore.corpus.path", corpus, "--datastore.folder", str(folder)]
        build_index.main(["states", "--backbone.model", str(model), "--backbone.device", "cpu", *options])
        stored.append(f"{name}={folder}")
    return stored


# ---- sweeps

SWEEP = yaml.safe_load((ROOT / "configs" / "sweeps" / "dispersion.yaml").read_text())


def sweep_command(**chosen: Any) -> list[str]:
    """The command line that W&B's agent makes of the sweep file; what is not chosen has its first value."""
    values = {name: chosen.get(name, options["values"][0]) for name, options in SWEEP["parameters"].items()}
    flags = create_sweep_command_args({"args": {name: {"value": value} for name, value in values.items()}})["args"]
    macros = {"${env}": [], "${interpreter}": [sys.executable], "${program}": [SWEEP["program"]], "${args}": flags}
    return [word for part in create_sweep_command(list(SWEEP["command"])) for word in macros.get(part, [part])]


@pytest.mark.parametrize("name", SWEEP["parameters"])
def test_every_value_of_the_sweep_makes_a_command_line_that_is_read(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    seen = []
    for value in SWEEP["parameters"][name]["values"]:
        config = parsed(sweep_command(**{name: value})[2:], monkeypatch)
        seen.append(str([config.model.gamma, config.model.dispersion, config.model.schedule.lr]))
    assert len(set(seen)) == len(SWEEP["parameters"][name]["values"])


@pytest.mark.slow
def test_a_command_of_the_sweep_runs_and_logs_to_wandb(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path
) -> None:
    steps = ("--trainer.max_steps=2", "--model.schedule.warmup_steps=1", "--model.schedule.decay_steps=1")
    options = (*steps, "--trainer.accelerator=cpu", "--trainer.callbacks.nlist=4", "--data.max_tokens=100")
    command = [*sweep_command(), f"--model.backbone.model={tiny_folder_of('marian')}", *data, *options]
    command += [f"--trainer.logger.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, cwd=ROOT, env=environment)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert not (tmp_path / "model").exists() and not list(tmp_path.rglob("*.ckpt")), "no run of a sweep writes a model"
