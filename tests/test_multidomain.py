"""The configurations of the multi-domain benchmark run, with a tiny model of the same family in place of the hub's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from script_parsers import ROOT
from script_runs import run
from tiny_stores import corpus_pairs, write_corpus

import build_index
import evaluate
import train

DOMAINS = ROOT / "configs" / "multidomain"
PUBLISHED = {"it": (8, 0.7, 10.0), "medical": (4, 0.8, 10.0), "koran": (16, 0.8, 100.0), "law": (4, 0.8, 10.0)}


def files(*names: str) -> list[str]:
    return [word for name in names for word in ("--config", str(DOMAINS / name))]


@pytest.mark.parametrize("domain", PUBLISHED)
def test_every_method_of_a_domain_runs_with_a_tiny_model(
    domain: str, tiny_folder_of: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data" / "multi_domain" / domain
    data.mkdir(parents=True)
    for seed, (split, size) in enumerate({"train": 24, "validation": 6, "test": 3}.items()):
        pairs = [pair for pair in corpus_pairs(40, seed) if int(pair.src.split()[0]) % 3 == seed]
        write_corpus(data / f"{split}.jsonl", pairs[:size])
    model = str(tiny_folder_of("fsmt"))
    build_index.main(["build", *files("build.yaml", f"{domain}/build.yaml"), "--backbone.model", model])
    short = ["--trainer.max_epochs", "1", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    train.main(["fit", *files("train.yaml", f"{domain}/adaptive_train.yaml"), "--model.backbone.model", model, *short])
    few = ["--decoding.max_new_tokens", "4", "--repeats", "1", "--examples", "0", "--backbone.model", model]
    for method in ("vanilla", "adaptive", "sk_mt"):
        run(evaluate.evaluate, *files("evaluate.yaml", f"{domain}/{method}.yaml"), *few)
    results = json.loads((tmp_path / "runs" / "multi_domain" / domain / "vanilla" / "results.json").read_text())
    knn = results["settings"]["knn"]
    assert (knn["k"], knn["lambda_"], knn["temperature"]) == PUBLISHED[domain]
    assert len(list((tmp_path / "runs").rglob("results.json"))) == 3


def test_each_domain_has_each_method() -> None:
    methods = {domain: {path.name for path in (DOMAINS / domain).iterdir()} for domain in PUBLISHED}
    assert len(set(map(frozenset, methods.values()))) == 1 and len(methods["it"]) == 5
    for domain, (k, _, temperature) in PUBLISHED.items():
        content = yaml.safe_load((DOMAINS / domain / "adaptive_train.yaml").read_text(encoding="utf-8"))
        options = content["model"]["combiner"]["init_args"]
        assert (options["k"], options["temperature"]) == (k, temperature)
