"""Systems side by side: the same sentences, the same treatment, and honest reports."""

import json
import logging
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sacrebleu
import torch
from tiny_stores import build_store, corpus_pairs

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.decoding import Decoding, Translations, Translator
from lightning_knnmt.evaluation.comparison import SystemResult, run_systems
from lightning_knnmt.evaluation.plots import plot_list_sizes
from lightning_knnmt.evaluation.report import environment, markdown_table, system_json, table
from lightning_knnmt.evaluation.scores import Score, paired_bootstrap
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.settings import KnnSettings
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.storage.files import write_json
from lightning_knnmt.timing import Spans

PAIRS = corpus_pairs(8, seed=5)


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def memory(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatastoreMemory]:
    with build_store(marian, tmp_path_factory.mktemp("comparison") / "store", corpus_pairs(20)) as store:
        build_index(store, IndexConfig("Flat"))
        yield DatastoreMemory(store, open_index(store))


class Scripted:
    """A system that takes given times for given translations."""

    def __init__(self, runs: Sequence[tuple[list[str], float, float]], order: list[str], name: str) -> None:
        self.runs, self.order, self.name = list(runs), order, name
        self.decoding, self.batch_size = Decoding(), 5

    def translate(self, sources: Sequence[str]) -> Translations:
        self.order.append(self.name)
        texts, seconds, search = self.runs.pop(0)
        spans = Spans()
        spans.seconds["search"] = search
        return Translations(texts, 120, seconds, spans)


def _scripted(runs: Sequence[tuple[list[str], float, float]], order: list[str], name: str) -> Any:
    return Scripted(runs, order, name)


TEXTS = ["Choose a file now.", "The table contains no data at all."]
TWO = [Pair("Wählen Sie eine Datei aus.", "Choose a file."), Pair("Leer", "The table contains no data.")]


def test_speed_is_the_median_of_the_repeats_after_a_warm_up_and_systems_take_turns():
    order: list[str] = []
    seconds = [100.0, 4.0, 1.0, 2.0]  # the warm-up does not count
    runs = [(TEXTS, value, value * share) for value, share in zip(seconds, (0.9, 0.1, 0.3, 0.2), strict=True)]
    systems = {name: _scripted(runs, order, name) for name in ("base", "knn")}
    speed = run_systems(systems, TWO, repeats=3)["knn"].speed
    assert order == ["base", "knn"] * 4
    assert speed.repeats == (30.0, 120.0, 60.0)
    assert speed.tokens_per_second == statistics.median([30.0, 120.0, 60.0])
    assert speed.search_share == pytest.approx(0.2)
    assert speed.batch_size == 5


def test_the_share_of_search_is_measured_around_the_index_search(marian: KeyedModel, memory: DatastoreMemory):
    settings, decoding = KnnSettings(4, 0.5, 5.0, 1), Decoding(2, 4, 10)
    mixture = settings.open(marian, memory)
    translators = {"base": Translator(marian, decoding=decoding), "knn": Translator(marian, mixture, decoding)}
    results = run_systems(translators, PAIRS, repeats=1)
    assert results["base"].speed.search_share == 0
    assert 0 < results["knn"].speed.search_share < 1
    assert results["base"].texts == Translator(marian, decoding=decoding).translate([pair.src for pair in PAIRS]).texts
    assert results["base"].texts != results["knn"].texts


def test_scores_are_those_of_the_translations_against_the_references(marian: KeyedModel):
    result = run_systems({"base": Translator(marian, decoding=Decoding(1, 4, 10))}, PAIRS, repeats=1)["base"]
    references = [[pair.tgt for pair in PAIRS]]
    assert result.scores.bleu.value == sacrebleu.corpus_bleu(result.texts, references).score
    assert result.scores.chrf.value == sacrebleu.corpus_chrf(result.texts, references).score


def test_sampling_starts_from_the_seed_in_every_repeat(marian: KeyedModel):
    translator = Translator(marian, decoding=Decoding(1, 4, 10, {"do_sample": True, "top_k": 0}))
    once, again, other = (run_systems({"base": translator}, PAIRS, repeats=1, seed=seed)["base"] for seed in (1, 1, 2))
    assert once.repeatable
    assert once.texts == again.texts != other.texts


def test_repeats_that_differ_are_reported_and_even_the_warm_up_counts(caplog: pytest.LogCaptureFixture):
    changed = [TEXTS[0], "Something else."]
    order: list[str] = []
    systems = {
        "base": _scripted([(TEXTS, 1.0, 0.0)] * 3, order, "base"),
        "knn": _scripted([(changed, 1.0, 0.0), (TEXTS, 1.0, 0.0), (TEXTS, 1.0, 0.0)], order, "knn"),
    }
    results = run_systems(systems, TWO, repeats=2)
    assert (results["base"].repeatable, results["knn"].repeatable) == (True, False)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == [
        "knn: 1 of 2 translations differ between repeats of the same run"
    ]


def test_nothing_to_compare_is_refused(marian: KeyedModel):
    translators = {"base": Translator(marian, decoding=Decoding(max_new_tokens=16))}
    with pytest.raises(ValueError, match="the test split is empty, expected one pair or more"):
        run_systems(translators, [])
    with pytest.raises(ValueError, match="repeats is 0, expected 1 or more"):
        run_systems(translators, PAIRS, repeats=0)


@pytest.fixture
def results() -> dict[str, SystemResult]:
    order: list[str] = []
    systems = {
        "base": _scripted([(TEXTS, 2.0, 0.0)] * 2, order, "base"),
        "knn": _scripted([([pair.tgt for pair in TWO], 3.0, 0.6)] * 2, order, "knn"),
    }
    return run_systems(systems, TWO, repeats=1)


def test_the_table_shows_the_figures_of_the_json(results: dict[str, SystemResult]):
    significance = {
        "knn": paired_bootstrap(results["base"].texts, results["knn"].texts, [p.tgt for p in TWO], samples=50)
    }
    results["knn"] = replace(results["knn"], comet=Score("COMET", 0.81234, "tiny"))
    lines = markdown_table(results, significance).splitlines()
    assert len({len(line) for line in lines}) == 1
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (lines[0], *lines[2:])]
    rows = {row[0]: dict(zip(cells[0], row, strict=True)) for row in cells[1:]}
    for name, result in results.items():
        figures = system_json(result)
        assert rows[name]["BLEU"] == f"{figures['bleu']:.1f}"
        assert rows[name]["chrF"] == f"{figures['chrf']:.1f}"
        assert rows[name]["tokens/s"] == f"{figures['tokens_per_second']:.0f}"
    assert (rows["base"]["COMET"], rows["knn"]["COMET"]) == ("–", "0.8123")
    assert (rows["base"]["relative speed"], rows["knn"]["relative speed"]) == ("1.00", "0.67")
    assert rows["knn"]["time in search"] == "20%"
    delta = significance["knn"].bleu
    assert rows["knn"]["ΔBLEU (95 %)"] == f"{delta.delta:+.1f} ({delta.low:+.1f} to {delta.high:+.1f})"


def test_a_system_without_tokens_has_no_relative_speed(results: dict[str, SystemResult]):
    silent = replace(results["base"], speed=replace(results["base"].speed, tokens_per_second=0.0))
    assert "| –" in markdown_table({"base": silent, "knn": results["knn"]}, {})


def test_scores_travel_with_their_signatures(results: dict[str, SystemResult]):
    figures = system_json(results["base"])
    assert figures["comet"] is None
    assert set(figures["signatures"]) == {"bleu", "chrf"}
    assert f"version:{sacrebleu.__version__}" in figures["signatures"]["bleu"]


def test_json_is_strict_and_keeps_what_it_can(tmp_path: Path):
    path = tmp_path / "new" / "results.json"
    content = {"path": Path("a/b"), "nan": float("nan"), "list": [float("inf"), 1.5, (2, "ü")], 3: {"x": -0.0}}
    write_json(path, content)

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    read = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    assert read == {"path": "a/b", "nan": None, "list": [None, 1.5, [2, "ü"]], "3": {"x": -0.0}}
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_the_environment_names_threads_and_versions():
    found = environment()
    assert found == environment(torch.device("cpu"))
    assert found["device"] == "cpu" and found["processor"]
    assert found["threads"]["torch"] == torch.get_num_threads()
    assert found["libraries"]["sacrebleu"] == sacrebleu.__version__


def test_columns_of_a_table_are_aligned():
    assert table([["a", "long head"], ["longer", "b"]]).splitlines() == [
        "| a      | long head |",
        "|--------|-----------|",
        "| longer | b         |",
    ]


def test_the_picture_shows_sorted_sizes_and_their_imbalance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from matplotlib.figure import Figure

    drawn: list[Figure] = []
    savefig = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **options: (drawn.append(self), savefig(self, *args)))
    sizes = np.array([3, 0, 9, 4])
    path = tmp_path / "pictures" / "sizes.png"
    plot_list_sizes({"IVF4": sizes}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    (axes,) = drawn[0].axes
    assert axes.lines[0].get_ydata().tolist() == [9, 4, 3, 0]
    assert axes.lines[1].get_ydata()[0] == 4.0  # an even index
    factor = 4 * (sizes**2).sum() / sizes.sum() ** 2
    assert axes.get_legend().get_texts()[0].get_text() == f"IVF4: imbalance factor {factor:.2f}"
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("inverted lists, largest first (%)", "entries in a list")
