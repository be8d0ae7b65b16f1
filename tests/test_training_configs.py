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


DISPERSION_CONFIGS = sorted((ROOT / "configs" / "dispersion").glob("*.yaml"))


def variants(path: Path) -> list[list[str]]:
    """The options of each variant that a configuration's comments tell of."""
    found = re.findall(r"^#   [^\n-][^\n]*?  +(--[^(\n]+)", path.read_text(), re.MULTILINE)
    return [line.split() for line in found]


def test_the_base_configuration_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(["fit", "--config", str(ROOT / "configs" / "base.yaml")], monkeypatch)
    assert (config.model.trainable, config.model.dispersion) == ("all", None)
    assert config.model.schedule.max_steps == config.trainer.max_steps


@pytest.mark.parametrize("path", DISPERSION_CONFIGS, ids=lambda path: path.stem)
def test_dispersion_configurations_and_their_variants_are_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = parsed(["fit", "--config", str(path)], monkeypatch)
    assert config.model.trainable == "last_block" and config.model.gamma == 1
    assert config.model.schedule.max_steps == config.trainer.max_steps <= 5000
    assert len(variants(path)) == 7
    for options in variants(path):
        other = parsed(["fit", "--config", str(path), *options], monkeypatch)
        assert other != config, options


def test_every_regulariser_is_named_as_a_variant() -> None:
    named = (ROOT / "configs" / "dispersion" / "pretix.yaml").read_text()
    from lightning_knnmt import dispersion

    concrete = [
        name for name, value in vars(dispersion).items()
        if isinstance(value, type) and issubclass(value, dispersion.Dispersion) and not value.__abstractmethods__
    ]  # fmt: skip
    assert len(concrete) == 9
    assert [name for name in concrete if name not in named] == []


def test_the_pretix_configuration_trains_a_folder_that_loads(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    short = (
        "--trainer.max_steps=3",
        "--model.schedule.max_steps=300",
        "--model.schedule.decay_steps=0",
        "--data.max_tokens=100",
    )
    small = ("--trainer.callbacks.init_args.nlist=4", "--trainer.accelerator=cpu", "--trainer.log_every_n_steps=1")
    config = yaml.safe_load((ROOT / "configs" / "dispersion" / "pretix.yaml").read_text())
    config["trainer"]["callbacks"][0]["init_args"]["nlist"] = 4
    Path("pretix.yaml").write_text(yaml.safe_dump(config))
    train.main(["fit", "--config=pretix.yaml", f"--model.model={tiny_folder_of('marian')}", *data, *short, *small[1:]])
    exported = load_model("runs/dispersion/pretix/model", device="cpu")
    assert not torch.equal(logits_of(exported), logits_of(load_model(str(tiny_folder_of("marian")), device="cpu")))
    rows = logged(Path("runs/dispersion/pretix/lightning_logs/version_0"))
    assert len(column(rows, "train/dispersion")) == 3 and len(column(rows, "val/imbalance_factor")) == 1
    assert list(Path("runs/dispersion/pretix").rglob("val_list_sizes_*.png"))


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
    options = (
        "--trainer.max_steps=2",
        "--trainer.accelerator=cpu",
        "--trainer.callbacks.nlist=4",
        "--data.max_tokens=100",
    )
    command = [*sweep_command(), f"--model.model={tiny_folder_of('marian')}", *data, *options]
    command += [f"--trainer.logger.save_dir={tmp_path}", f"--trainer.default_root_dir={tmp_path}"]
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, check=True, timeout=300, cwd=ROOT, env=environment)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
