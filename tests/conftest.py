"""Tiny models of every family, made once per session."""

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import TINY_FAMILIES, TinyFamily

from lightning_knnmt.backbone import Backbone


@pytest.fixture(scope="session")
def tiny_folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the folder of a tiny model by its name in TINY_FAMILIES, making it at the first call."""
    root = tmp_path_factory.mktemp("tiny")

    def folder_of(name: str) -> Path:
        folder = root / name
        if not folder.exists():
            TINY_FAMILIES[name].make(folder)
        return folder

    return folder_of


@pytest.fixture(scope="session", params=list(TINY_FAMILIES))
def tiny_name(request: pytest.FixtureRequest) -> str:
    """The name of every tiny model in turn."""
    return request.param


@pytest.fixture(scope="session")
def tiny_family(tiny_name: str) -> TinyFamily:
    """The description of every tiny model in turn."""
    return TINY_FAMILIES[tiny_name]


@pytest.fixture(scope="session")
def tiny_folder(tiny_name: str, tiny_folder_of: Callable[[str], Path]) -> Path:
    """The folder of every tiny model in turn; read only."""
    return tiny_folder_of(tiny_name)


@pytest.fixture(scope="session")
def tiny_backbone(tiny_folder: Path, tiny_family: TinyFamily) -> Backbone:
    """A backbone on every tiny model in turn, with decoder outputs as keys; to be left unchanged."""
    return Backbone(str(tiny_folder), device="cpu", **tiny_family.languages)


@pytest.fixture(scope="session")
def marian_folder(tiny_folder_of: Callable[[str], Path]) -> Path:
    """The folder of a tiny Marian model as init_model.py makes them; read only."""
    return tiny_folder_of("marian_scratch")
