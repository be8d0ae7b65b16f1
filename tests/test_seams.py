"""Parts that the package does not know are used by every script, chosen in YAML alone."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import own_parts
import pytest
import torch
import yaml
from own_parts import OwnCombiner, OwnGate, OwnRetriever
from script_runs import DECODING, Domain, expect_error, run, write_config
from torch import nn

import evaluate
import translate
from lightning_knnmt import load_model, load_translator
from lightning_knnmt.decoding import Decoding, Translator
from lightning_knnmt.evaluation.explanation import explain, explanation_lines
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.memory import open_memory

PARTS: dict[str, Any] = {
    "retriever": {"class_path": "own_parts.OwnRetriever", "init_args": {"k": 3, "divisor": 3}},
    "combiner": {"class_path": "own_parts.OwnCombiner", "init_args": {"start": 3.0, "temperature": 5.0}},
    "gate": {"class_path": "own_parts.OwnGate", "init_args": {"modulus": 2}},
}


@pytest.fixture
def config(domain: Domain) -> dict[str, Any]:
    return {
        "backbone": {"model": str(domain.model), "device": "cpu"},
        "datastore": str(domain.root / "store"),
        "decoding": DECODING,
        **PARTS,
    }


def translated(path: Path, domain: Domain, *options: str) -> list[str]:
    (path.parent / "in.txt").write_text("".join(f"{line}\n" for line in domain.sources("test")), encoding="utf-8")
    out = path.parent / "out.txt"
    run(translate.translate, "--config", path, "--input", path.parent / "in.txt", "--output", out, *options)
    return out.read_text(encoding="utf-8").splitlines()


def test_translate_uses_own_parts(domain: Domain, config: dict[str, Any], tmp_path: Path) -> None:
    own_parts.forget()
    found = translated(write_config(tmp_path / "translate.yaml", config), domain)
    seen, opened, searched = own_parts.counts()
    assert 0 < opened == searched < seen
    with open_memory(domain.root / "store") as memory:
        model = load_model(str(domain.model), device="cpu")
        own = Mixture(model, memory, OwnRetriever(3, 3), OwnCombiner(3.0, temperature=5.0), OwnGate(2))
        usual = KnnSettings(k=3, temperature=5.0).open(model, memory)
        expected, other, plain = (
            Translator(model, *mixture, decoding=Decoding(**DECODING)).translate(domain.sources("test")).texts
            for mixture in ((own,), (usual,), ())
        )
    assert found == expected
    assert found != other and found != plain


def test_explaining_shows_the_neighbors_of_the_own_retriever(
    domain: Domain, config: dict[str, Any], tmp_path: Path
) -> None:
    path = write_config(tmp_path / "translate.yaml", config)
    lines = translated(path, domain, "--explain", "3")
    translator = load_translator(path)
    mixture = translator.mixture
    assert isinstance(mixture, Mixture)
    thirds = [mixture.memory.context(entry) for entry in range(0, len(mixture.memory), 3)]
    expected, closed = [], 0
    for source in domain.sources("test"):
        found = explain(mixture, source, translator.decoding)
        expected += [found.text, *explanation_lines(found)]
        for token in found.tokens:
            assert all(neighbor.context in thirds for neighbor in token.neighbors)
            if not token.neighbors:
                assert token.probability == pytest.approx(token.model_probability, abs=1e-6)
                closed += 1
    assert lines == expected
    assert closed > 0 and any("⇐" in line for line in lines)


def test_evaluate_tunes_options_of_own_parts_and_writes_what_translate_takes(
    domain: Domain, config: dict[str, Any], tmp_path: Path
) -> None:
    grid = {"k": [2, 3], "lambda_": [0.5], "nprobe": [1, 4], "finalists": 2, "temperature": [5.0]}
    grid["others"] = {"scale": [1.0, 200.0], "modulus": [2, 7]}
    evaluation = config | {
        "test": {"path": domain.root / "data" / "test.jsonl"},
        "tuning": {"validation": {"path": domain.root / "data" / "validation.jsonl"}, "grid": grid},
        "repeats": 1,
        "out": tmp_path / "out",
    }
    run(evaluate.evaluate, "--config", write_config(tmp_path / "evaluate.yaml", evaluation))
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["tuning"]["tried"] == 2 * 2 * 2
    mixture = results["settings"]["mixture"]
    assert {name: part["class_path"] for name, part in mixture.items()} == {
        name: part["class_path"] for name, part in PARTS.items()
    }
    assert mixture == results["tuning"]["best"] and results["settings"]["knn"] is None
    assert mixture["retriever"]["init_args"]["divisor"] == 3  # as it was given
    assert mixture["combiner"]["init_args"]["scale"] in (1.0, 200.0)
    assert mixture["gate"]["init_args"]["modulus"] in (2, 7)
    finalists = results["tuning"]["finalists"]
    assert len({json.dumps(finalist["settings"]) for finalist in finalists}) == 2
    assert "OwnRetriever(" in (tmp_path / "out" / "results.md").read_text(encoding="utf-8")
    written = tmp_path / "out" / "translate.yaml"
    assert {name: yaml.safe_load(written.read_text(encoding="utf-8"))[name] for name in PARTS} == mixture
    texts = load_translator(str(written)).translate(domain.sources("test")).texts
    own_parts.forget()
    assert translated(written, domain) == texts
    seen, opened, searched = own_parts.counts()
    assert 0 < opened == searched < seen
    assert len(set(texts)) > 1


def test_an_own_model_class_is_used_by_its_class_path(domain: Domain, config: dict[str, Any], tmp_path: Path) -> None:
    config["backbone"]["model_class"] = "own_parts.OwnModel"
    found = translated(write_config(tmp_path / "own.yaml", config), domain)
    del config["backbone"]["model_class"]
    translator = load_translator(write_config(tmp_path / "theirs.yaml", config))
    assert found == translator.translate([source.upper() for source in domain.sources("test")]).texts
    assert found != translator.translate(domain.sources("test")).texts


def test_the_short_form_stands_for_what_is_not_chosen_by_class(
    domain: Domain, config: dict[str, Any], tmp_path: Path
) -> None:
    config = {name: value for name, value in config.items() if name not in ("retriever", "gate")}
    config["knn"] = {"k": 5, "nprobe": 4, "lambda_": 0.25}
    mixture = load_translator(write_config(tmp_path / "translate.yaml", config)).mixture
    assert isinstance(mixture, Mixture)
    assert repr(mixture.retriever) == "WholeStore(k=5, nprobe=4, rescore=0, ef_search=None)"
    assert repr(mixture.combiner) == "OwnCombiner(start=3.0, scale=20.0, temperature=5.0)"
    assert repr(mixture.gate) == "OpenGate()"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"retriever": {"class_path": "own_parts.Nothing"}}, "own_parts.Nothing"),
        ({"combiner": {"class_path": "own_parts.OwnGate"}}, "own_parts.OwnGate"),
        ({"gate": {"class_path": "own_parts.OwnGate", "init_args": {"moduls": 3}}}, "moduls"),
    ],
)
def test_a_part_that_does_not_fit_is_named(
    changes: dict[str, Any], message: str, config: dict[str, Any], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    path = write_config(tmp_path / "translate.yaml", config | changes)
    expect_error(capsys, translate.translate, "--config", path, expected=message)
    with pytest.raises(ValueError, match=message):
        load_translator(path)


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        ("own_parts.Nothing", r"model_class is 'own_parts.Nothing', which cannot be imported"),
        ("own_parts.OwnGate", r"model_class is 'own_parts.OwnGate', expected a subclass of .*KeyedModel"),
        ("Nothing", r"model_class is 'Nothing', which cannot be imported"),
    ],
)
def test_a_model_class_that_does_not_fit_is_refused(model_class: str, message: str, marian_folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        load_model(marian_folder, model_class=model_class)


def test_with_options_changes_what_has_them_and_keeps_trained_parameters_without_changes() -> None:
    combiner = OwnCombiner(start=1.0)
    with torch.no_grad():
        combiner.offset.fill_(7.0)
    config = MixtureConfig.of(combiner=combiner)
    assert combiner.with_options().offset.item() == 7.0
    changed = config.with_options(k=9, scale=3.0)
    assert changed.retriever.options["k"] == 9 and changed.combiner.options["scale"] == 3.0
    assert changed.combiner.options["start"] == 1.0
    with pytest.raises(ValueError, match="modulus is no option of WholeStore, OwnCombiner, OpenGate"):
        config.with_options(modulus=3)
    with pytest.raises(ValueError, match=r"OwnCombiner has no option k, expected \('start', 'scale', 'temperature'\)"):
        combiner.with_options(k=3)


def test_an_option_that_is_not_kept_under_its_name_is_named() -> None:
    class Forgetful(OwnCombiner):
        def __init__(self, width: int = 3) -> None:
            super().__init__()

    class Parameter(OwnCombiner):
        def __init__(self, start: float = 3.0) -> None:
            super().__init__(start)
            del self.start
            self.start = nn.Parameter(torch.tensor(start))  # type: ignore[assignment]

    for made, name in ((Forgetful(), "width"), (Parameter(), "start")):
        with pytest.raises(TypeError, match=f"{type(made).__name__} has an option {name}, expected its value as given"):
            _ = made.options
