"""Tiny models for tests and doctests, made where one asks for them."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests"))


@pytest.fixture(scope="session")
def tiny_folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny model by its name in TINY_FAMILIES, making it at the first call."""
    root = tmp_path_factory.mktemp("tiny")

    def folder_of(name: str) -> Path:
        from tiny_models import TINY_FAMILIES  # here: it imports transformers

        folder = root / name
        if not folder.exists():
            TINY_FAMILIES[name].make(folder)
        return folder

    return folder_of


@pytest.fixture(autouse=True)
def _names_of_doctests(request: pytest.FixtureRequest, doctest_namespace: dict[str, Any]) -> None:
    """Doctests that speak of `tiny_model` get the folder of a tiny Marian model, and `load_model`."""
    test = request.node.dtest if isinstance(request.node, pytest.DoctestItem) else None
    if test is not None and any("tiny_model" in example.source for example in test.examples):
        from lightning_knnmt import load_model

        folder_of = request.getfixturevalue("tiny_folder_of")
        doctest_namespace |= {"tiny_model": str(folder_of("marian_scratch")), "load_model": load_model}
