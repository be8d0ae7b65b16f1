"""Arrows point down: which package of the house may import which, and what a command loads when it starts."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "lightning_knnmt"

# [room -> rooms that it may import]; every room may import itself, `checks`, `timing` and `metric`. Imports for types
# alone (under TYPE_CHECKING) are not counted: nothing runs by them.
MAY_IMPORT = {
    "storage": set(),
    "data": set(),
    "dispersion": set(),
    "backbone": {"data"},
    "datastore": {"storage", "data", "backbone"},
    "sentences": {"storage", "data", "backbone"},
    "knn": {"data", "backbone", "sentences", "storage"},
    "index": {"storage", "datastore"},
    "memory": {"storage", "data", "datastore", "index", "knn", "sentences"},
    "building": {"storage", "data", "backbone", "datastore", "index", "knn", "memory", "sentences"},
    "training": {"data", "backbone", "dispersion", "datastore", "index", "storage", "knn", "memory"},
    "decoding": {"data", "backbone", "knn", "memory", "index", "storage"},
    "evaluation": {
        "storage",
        "data",
        "backbone",
        "dispersion",
        "datastore",
        "index",
        "knn",
        "memory",
        "decoding",
        "building",
    },
}
# [library -> rooms that may import it]
LIBRARIES = {
    "faiss": {"index"},
    "h5py": {"datastore", "building"},
}


def imported(path: Path) -> Iterator[str]:
    """Modules that a file imports, anywhere but under TYPE_CHECKING."""
    todo: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        todo += ast.iter_child_nodes(node)


def files_of(room: str) -> list[Path]:
    return sorted((ROOT / PACKAGE / room).rglob("*.py")) or [ROOT / PACKAGE / f"{room}.py"]


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_a_room_imports_only_rooms_below_it(room: str) -> None:
    allowed = {room, "checks", "timing", "metric", "cli", *MAY_IMPORT[room]}
    assert files_of(room)
    for path in files_of(room):
        rooms = {name.split(".")[1] for name in imported(path) if name.startswith(f"{PACKAGE}.")}
        assert rooms <= allowed, f"{path} imports {sorted(rooms - allowed)}"


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_library_is_imported_only_where_it_is_at_home(library: str) -> None:
    rooms = {path.relative_to(ROOT / PACKAGE).parts[0] for path in (ROOT / PACKAGE).rglob("*.py")
             if any(name.split(".")[0] == library for name in imported(path))}  # fmt: skip
    assert rooms and rooms <= LIBRARIES[library]


def loaded_after(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after some code."""
    tell = "import sys; print(' '.join({name.split('.')[0] for name in sys.modules}))"
    command = [sys.executable, "-c", f"import contextlib, io\n{code}\n{tell}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def script(*args: str, name: str = "build_index.py") -> str:
    return (
        "import runpy, sys\n"
        f"sys.argv = [{name!r}, *{args!r}]\n"
        "with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):\n"
        f"    runpy.run_path({name!r}, run_name='__main__')"
    )


@pytest.mark.parametrize(
    "args",
    [("--help",), ("build", "--help"), ("plan", "--help"), ("append", "--help"), ("verify", "--help"),
     ("remove", "--help"), ("compact", "--help"), ("prune", "--help"), ("sentences", "--help")],
)  # fmt: skip
def test_help_loads_neither_models_nor_faiss(args: tuple[str, ...]) -> None:
    assert not loaded_after(script(*args)) & {"torch", "transformers", "faiss", "lightning"}


def test_help_of_an_import_loads_no_models() -> None:
    assert not loaded_after(script("--help", name="import_model.py")) & {"torch", "transformers", "faiss", "lightning"}


def test_verify_and_remove_load_neither_models_nor_faiss(tmp_path: Path) -> None:
    import numpy as np
    from tiny_stores import write_store

    from lightning_knnmt.building.index import build_index
    from lightning_knnmt.datastore import Datastore
    from lightning_knnmt.index.config import IndexConfig

    folder, rng = tmp_path / "store", np.random.default_rng(0)
    keys, values = rng.normal(size=(20, 4)).astype(np.float16), np.arange(20, dtype=np.int32)
    with write_store(folder, keys, values) as store:
        build_index(store, IndexConfig("Flat"))
    for args in (("verify", str(folder)), ("remove", str(folder), "--document", "unknown")):
        loaded = loaded_after(script(*args))
        assert "h5py" in loaded or args[0] == "verify"
        assert not loaded & {"torch", "transformers", "faiss", "lightning"}
    with Datastore(folder) as store:
        assert len(store) == 20


@pytest.mark.parametrize(
    "module", ["storage.ranks", "storage.lock", "datastore", "datastore.mapped_keys", "building.verify",
               "building.remove", "building.config", "index.config", "index.report", "cli"],
)  # fmt: skip
def test_modules_that_must_start_at_once_load_no_torch(module: str) -> None:
    assert not loaded_after(f"import {PACKAGE}.{module}") & {"torch", "transformers", "faiss"}
