"""Every file in configs/ is a configuration of one of the scripts."""

from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentError
from script_parsers import ROOT, SCRIPTS, parse

SHARED = {
    ROOT / "configs" / "training.yaml": ROOT / "configs" / "dispersion" / "libreoffice_help.yaml"
}  # [defaults of a script -> a config of it]
DOMAINS = ROOT / "configs" / "multidomain"
SHARED |= {
    DOMAINS / "build.yaml": DOMAINS / "it" / "build.yaml",
    DOMAINS / "evaluate.yaml": DOMAINS / "it" / "vanilla.yaml",
}
SHARED |= {DOMAINS / "train.yaml": DOMAINS / "it" / "adaptive_train.yaml"}
BASES = {
    path: DOMAINS / {"build": "build.yaml", "adaptive_train": "train.yaml"}.get(path.stem, "evaluate.yaml")
    for path in DOMAINS.glob("*/*.yaml")
}  # [config -> what it shares with others and comes before it]
SWEEPS = sorted((ROOT / "configs" / "sweeps").glob("*.yaml"))  # of W&B, which calls a script
CONFIGS = [path for path in sorted((ROOT / "configs").rglob("*.yaml")) if path not in SWEEPS]


def _with_its_base(config: Path) -> list[str]:
    """The options that name a configuration; what is shared by others does not stand alone."""
    files = [config, SHARED[config]] if config in SHARED else [BASES[config], config] if config in BASES else [config]
    return [word for file in files for word in ("--config", str(file))]


def _subcommand(script: str) -> list[str]:
    return ["fit"] if script == "train.py" else []


def _takers(config: Path) -> dict[str, str]:
    """What each script says of a configuration; nothing if it takes it."""
    answers = {}
    for script in SCRIPTS:
        try:
            parse(script, [*_subcommand(script), *_with_its_base(config)])
            answers[script] = ""
        except ArgumentError as error:
            answers[script] = str(error)
    return answers


def test_there_are_configs_and_scripts():
    assert len(CONFIGS) >= 9
    assert {"train.py", "build_index.py", "evaluate.py", "translate.py"} <= set(SCRIPTS)
    assert not list((ROOT / "configs").rglob("*.yml"))


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config_is_taken_by_one_script_and_says_what_it_is(config: Path):
    answers = _takers(config)
    assert list(answers.values()).count("") == 1, answers
    assert config.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_config_with_an_option_too_many_is_taken_by_none(config: Path, tmp_path: Path):
    content = yaml.safe_load(config.read_text(encoding="utf-8"))
    broken = tmp_path / config.name
    broken.write_text(yaml.safe_dump(content | {"no_such_option": 1}), encoding="utf-8")
    assert "" not in _takers(broken).values()


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.name)
def test_sweep_calls_a_script_with_values_that_it_takes(sweep: Path):
    content = yaml.safe_load(sweep.read_text(encoding="utf-8"))
    values = {name: choice["values"] for name, choice in content["parameters"].items()}
    words = content["command"][content["command"].index("${program}") + 1 :]
    first = {name: options[0] for name, options in values.items()}
    for name, option in ((name, option) for name, options in values.items() for option in options):
        chosen = first | {name: option}
        args = [f"--{name}={value}" for name, value in chosen.items()]
        parse(content["program"], [part for word in words for part in (args if word == "${args}" else [word])])
