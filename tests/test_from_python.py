"""What `import lightning_knnmt` offers, and how scripts are reached from Python and Python's options from scripts."""

import contextlib
import inspect
import io
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from script_runs import DECODING, ROOT, Domain, expect_error, run, write_config
from tiny_models import GERMAN
from tiny_stores import corpus_pairs, write_corpus

import build_index
import evaluate
import lightning_knnmt
import translate
from lightning_knnmt import build_memory, explain, load_model, load_translator, open_memory
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.readers import CorpusFile, read_pairs
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.evaluation.plots import plot_list_sizes, sample_store
from lightning_knnmt.index import faiss_index
from lightning_knnmt.index.faiss_index import FaissIndex
from lightning_knnmt.knn.mixture import Mixture

BLOCK = re.compile(r"^## From Python\n.*?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(marian_folder, device="cpu")


def test_the_readmes_python_runs_and_translates_from_memory(marian_folder: Path) -> None:
    (match,) = BLOCK.finditer((ROOT / "README.md").read_text(encoding="utf-8"))
    code = match[1]
    assert len(code.splitlines()) <= 15
    assert code.count('"Helsinki-NLP/opus-mt-de-en"') == 1
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(code.replace('"Helsinki-NLP/opus-mt-de-en"', repr(str(marian_folder))), {})
    text, *tokens = out.getvalue().splitlines()
    assert text == "['The password is wrong.']"
    assert len(tokens) > 3 and "Please choose an event." in tokens[0].replace("[", "").replace("]", "")


def test_exported_names_have_docstrings_and_are_loaded_when_asked_for() -> None:
    names = [name for name in lightning_knnmt.__all__ if name != "__version__"]
    assert 8 <= len(names) <= 12
    for name in names:
        assert len(inspect.getdoc(getattr(lightning_knnmt, name)) or "") > 30
    with pytest.raises(AttributeError, match="module 'lightning_knnmt' has no attribute 'nothing'"):
        _ = lightning_knnmt.nothing
    assert loaded_by("import lightning_knnmt") == set()


def loaded_by(code: str) -> set[str]:
    """Which heavy libraries a fresh interpreter has imported."""
    heavy = {"faiss", "h5py", "transformers", "torch"}
    script = f"import sys\n{code}\nprint(*sorted({heavy!r} & {{name.partition('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_the_equation_needs_torch_only() -> None:
    files = sorted((ROOT / "lightning_knnmt" / "knn").rglob("*.py"))
    modules = [".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__") for file in files]
    assert "lightning_knnmt.knn.combiners.fixed" in modules and len(modules) > 10
    assert loaded_by("\n".join(f"import {module}" for module in modules)) == {"torch"}


@pytest.mark.parametrize("folder", [False, True])
def test_one_string_in_place_of_a_list_is_refused(marian: KeyedModel, tmp_path: Path, folder: bool) -> None:
    where = {"folder": tmp_path / "store"} if folder else {}
    with pytest.raises(
        TypeError, match=r"sources is one string, 'Öffnen', expected a list of strings: write \['Öffnen'"
    ):
        build_memory(marian, "Öffnen", ["Open"], **where)
    with pytest.raises(TypeError, match="targets is one string, 'Open', expected a list of strings"):
        build_memory(marian, ["Öffnen"], "Open", **where)
    for ask in (marian.tokenize, marian.batch):
        with pytest.raises(TypeError, match="sources is one string, 'Öffnen', expected a list of strings"):
            ask("Öffnen")
        with pytest.raises(TypeError, match="targets is one string, 'Open', expected a list of strings"):
            ask(["Öffnen"], "Open")
    assert not (tmp_path / "store").exists()


def test_strings_are_taken_where_paths_are(domain: Domain, tmp_path: Path) -> None:
    folder = str(domain.root / "store")
    with Datastore(folder) as store, open_memory(folder) as memory:
        assert store.fingerprint == memory.datastore.fingerprint
    assert len(sample_store(folder, size=10).keys) == 10
    plot_list_sizes({"a": np.array([3, 1])}, str(tmp_path / "new" / "sizes.png"))
    assert (tmp_path / "new" / "sizes.png").exists()
    pairs = corpus_pairs(3)
    assert list(read_pairs(CorpusFile(str(write_corpus(tmp_path / "pairs.jsonl", pairs).path)))) == pairs  # type: ignore[arg-type]
    model = load_model(str(domain.model), device="cpu")
    model.save(str(tmp_path / "saved"))  # type: ignore[arg-type]
    assert load_model(str(tmp_path / "saved"), device="cpu").tokenizer_fingerprint == model.tokenizer_fingerprint


@pytest.mark.parametrize("kind", [str, Path])
def test_load_translator_is_translate_with_the_same_file(domain: Domain, tmp_path: Path, kind: type) -> None:
    config = domain.root / "out" / "translate.yaml"
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in domain.sources("test")), encoding="utf-8")
    run(translate.translate, "--config", config, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    translator = load_translator(kind(config))
    texts = translator.translate(domain.sources("test")).texts
    assert texts == (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines()
    assert isinstance(translator.mixture, Mixture)
    assert explain(translator.mixture, domain.sources("test")[0], translator.decoding).text == texts[0]


def test_a_file_that_is_no_configuration_is_named(domain: Domain, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"none.yaml, which is no file; expected a configuration such as"):
        load_translator(tmp_path / "none.yaml")
    path = write_config(tmp_path / "other.yaml", {"backbone": {"model": domain.model}, "bogus": 1})
    with pytest.raises(ValueError, match="bogus"):
        load_translator(path)


def test_mapped_indexes_and_ef_search_are_options_of_translate(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: set[tuple[bool, int | None]] = set()
    read, choose, mapped = faiss_index.read_index, FaissIndex._choose, [False]

    def heard_read(path: Path, mmap: bool = False) -> Any:
        mapped[0] = mmap
        return read(path, mmap)

    def heard_search(index: FaissIndex, nprobe: int, ef_search: int | None) -> None:
        asked.add((mapped[0], ef_search))
        choose(index, nprobe, ef_search)

    monkeypatch.setattr(faiss_index, "read_index", heard_read)
    monkeypatch.setattr(FaissIndex, "_choose", heard_search)
    shutil.copytree(domain.root / "store", tmp_path / "store")
    where = ("--datastore.folder", tmp_path / "store")
    for name, factory in (("graph", "HNSW4"), ("flat", "Flat")):
        options = ("--index.factory", factory, "--index.name", name)
        run(build_index.build, "--config", domain.root / "build.yaml", *where, *options)
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in domain.sources("test")), encoding="utf-8")
    config = ("--config", domain.root / "out" / "translate.yaml", "--datastore", tmp_path / "store")
    config += ("--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt", "--overwrite", "true")
    texts = []
    for options in (
        ("--index", "flat"), ("--index", "flat", "--mmap", "true"), ("--index", "graph", "--knn.ef_search", "500"),
        ("--index", "graph", "--mmap", "true", "--knn.ef_search", "500"),
    ):  # fmt: skip
        run(translate.translate, *config, *options)
        texts.append((tmp_path / "out.txt").read_text(encoding="utf-8"))
    assert asked == {(False, None), (True, None), (False, 500), (True, 500)}
    assert texts[0] == texts[1] and texts[2] == texts[3]
    options = (*config, "--index", "flat", "--knn.ef_search", "9")
    expected = "ef_search is 9, but the index has no HNSW graph; leave it out"
    expect_error(capsys, translate.translate, *options, expected=expected)


EVALUATE = """
import json, os, sys
sys.path.insert(0, {root!r})
import evaluate
from lightning_knnmt.cli import run_script

measured = evaluate.run_systems


def run_systems(*args, **options):
    results = measured(*args, **options)
    texts = {{name: result.texts for name, result in results.items()}}
    with open(f"texts-{{os.environ.get('LOCAL_RANK', '0')}}.json", "w") as file:
        json.dump(texts, file)
    return results


evaluate.run_systems = run_systems
run_script(evaluate.evaluate)
"""


def store_in_parts(domain: Domain, folder: Path) -> Path:
    """A copy of the domain's store whose index `shards` has several parts."""
    shutil.copytree(domain.root / "store", folder)
    options = ("--index.name", "shards", "--index.layout", "shards", "--index.part_entries", "150")
    run(build_index.build, "--config", domain.root / "build.yaml", "--datastore.folder", folder, *options)
    return folder


@pytest.mark.slow
def test_two_processes_translate_what_one_does(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ("--config", domain.root / "out" / "translate.yaml", "--index", "shards", "--block", "3")
    config += ("--datastore", store_in_parts(domain, tmp_path / "store"))
    lines = domain.sources("test")
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in [*lines[:2], "", *lines[2:]]), encoding="utf-8")
    run(translate.translate, *config, "--input", tmp_path / "in.txt", "--output", tmp_path / "alone.txt")
    command = [sys.executable, str(ROOT / "translate.py"), *map(str, config), "--processes.devices", "2"]
    with (tmp_path / "in.txt").open("rb") as lines_in:
        together = subprocess.run(command, cwd=tmp_path, stdin=lines_in, check=True, timeout=600, capture_output=True)
    alone = (tmp_path / "alone.txt").read_bytes()
    assert together.stdout == alone and alone.count(b"\n") == len(lines) + 1
    expected = "explain is 3, which one process does alone"
    expect_error(capsys, translate.translate, *config, "--explain", "3", "--processes.devices", "2", expected=expected)


@pytest.mark.slow
def test_two_processes_evaluate_what_one_does(domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, runs = store_in_parts(domain, tmp_path / "store"), []
    (tmp_path / "evaluate.py").write_text(EVALUATE.format(root=str(ROOT)), encoding="utf-8")
    monkeypatch.setattr(evaluate, "run_systems", evaluate.run_systems)  # which the file replaces, until the test ends
    for devices in ("1", "2"):
        where = tmp_path / devices
        where.mkdir()
        command = [str(tmp_path / "evaluate.py"), "--config", str(domain.root / "evaluate.yaml"), "--examples", "0"]
        command += ["--datastore", str(store), "--index", "shards", "--repeats", "1", "--out", str(where / "out")]
        command += ["--processes.devices", devices]
        if devices == "1":
            monkeypatch.chdir(where)
            monkeypatch.setattr(sys, "argv", command)
            runpy.run_path(command[0], run_name="__main__")
        else:
            subprocess.run([sys.executable, *command], cwd=where, check=True, timeout=600, capture_output=True)
        texts = [json.loads(path.read_text()) for path in sorted(where.glob("texts-*.json"))]
        assert len(texts) == int(devices) and all(each == texts[0] for each in texts)
        runs.append((texts[0], json.loads((where / "out" / "results.json").read_text(encoding="utf-8"))))
    (one, alone), (two, together) = runs
    assert two == one and len(one["knn"]) == 8 and one["knn"] != one["base"]
    assert together["settings"]["knn"] == alone["settings"]["knn"]
    for name in ("base", "knn"):
        for score in ("bleu", "chrf"):
            assert together["systems"][name][score] == alone["systems"][name][score]
    assert together["settings"]["datastore"]["index_device"] == "cpu, 2 processes"


def test_translations_of_no_lines_and_of_one(domain: Domain) -> None:
    translator = load_translator(domain.root / "out" / "translate.yaml")
    assert translator.translate([]).texts == []
    assert translator.translate(GERMAN[:1]).texts == translator.translate(tuple(GERMAN[:1])).texts
    assert translator.decoding.beams == DECODING["beams"]
