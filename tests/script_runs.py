"""Runs of the scripts, and a small domain that they prepare, build and evaluate."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import ENGLISH, GERMAN

import build_index
import evaluate
import prepare_data
from lightning_knnmt.cli import run_script

ROOT = Path(__file__).parents[1]
DECODING = {"beams": 2, "batch_size": 8, "max_new_tokens": 24}


def write_config(path: Path, config: dict[str, Any]) -> Path:
    """A YAML file; paths become text."""
    path.write_text(yaml.safe_dump(json.loads(json.dumps(config, default=str))), encoding="utf-8")
    return path


def run(function: Callable[..., Any], *args: str | Path) -> None:
    """Run a script as its command line does."""
    run_script(function, [str(arg) for arg in args])


@dataclass
class Domain:
    """What the scripts made: a corpus, a datastore with an index, and results."""

    root: Path
    model: Path

    @property
    def results(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is no JSON")

        text = (self.root / "out" / "results.json").read_text(encoding="utf-8")
        return json.loads(text, parse_constant=refuse)

    def sources(self, split: str) -> list[str]:
        return [pair["src"] for pair in self._pairs(split)]

    def references(self, split: str) -> list[str]:
        return [pair["tgt"] for pair in self._pairs(split)]

    def _pairs(self, split: str) -> list[dict[str, str]]:
        lines = (self.root / "data" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
        return [json.loads(line) for line in lines]


def make_domain(root: Path, marian_folder: Path) -> Domain:
    """Prepare, build and evaluate: each sentence comes with many endings, and is translated without them."""
    rows = [(f"{src} {ending}", tgt) for ending in range(12) for src, tgt in zip(GERMAN, ENGLISH, strict=True)]
    (root / "corpus.tsv").write_text("".join(f"{src}\t{tgt}\n" for src, tgt in rows), encoding="utf-8")
    corpus = {
        "class_path": "lightning_knnmt.data.recipes.ParallelFiles",
        "init_args": {"files": [{"path": root / "corpus.tsv"}]},
    }
    splits = {"by": "source", "validation": 8, "test": 8}
    prepare = {"corpus": corpus, "splits": splits, "out": root / "data", "cache": root / "cache"}
    run(prepare_data.prepare, "--config", write_config(root / "prepare.yaml", prepare))
    build = {
        "backbone": {"model": marian_folder, "device": "cpu"},
        "datastore": {"folder": root / "store", "corpus": {"path": root / "data" / "train.jsonl"}},
        "index": {"factory": "IVF4,Flat", "train_points": 200},
    }
    run(build_index.build, "--config", write_config(root / "build.yaml", build))
    evaluation = {
        "backbone": {"model": marian_folder, "device": "cpu"},
        "datastore": root / "store",
        "test": {"path": root / "data" / "test.jsonl"},
        "tuning": {
            "validation": {"path": root / "data" / "validation.jsonl"},
            "grid": {"k": [2, 4], "lambda_": [0.3, 0.9], "nprobe": [1, 4], "finalists": 2},
        },
        "decoding": DECODING,
        "repeats": 2,
        "overwrite": True,
        "out": root / "out",
    }
    run(evaluate.evaluate, "--config", write_config(root / "evaluate.yaml", evaluation))
    return Domain(root, marian_folder)


def expect_error(
    capsys: pytest.CaptureFixture[str], function: Callable[..., Any], *args: str | Path, expected: str
) -> None:
    """A script ends with status 2 and a message, without a traceback."""
    with pytest.raises(SystemExit) as exit:
        run(function, *args)
    assert exit.value.code == 2
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err
    assert captured.out == ""
