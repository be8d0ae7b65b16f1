"""Tiny models of every family, and a domain made with one of them, each made once per session."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from tiny_models import TINY_FAMILIES, TinyFamily

from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel

if TYPE_CHECKING:
    from script_runs import Domain


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
def tiny_backbone(tiny_folder: Path, tiny_family: TinyFamily) -> KeyedModel:
    """A backbone on every tiny model in turn, with decoder outputs as keys; to be left unchanged."""
    return load_model(str(tiny_folder), device="cpu", **tiny_family.languages)


@pytest.fixture(scope="session")
def marian_folder(tiny_folder_of: Callable[[str], Path]) -> Path:
    """The folder of a tiny Marian model as benchmarks/scratch_model.py makes them; read only."""
    return tiny_folder_of("marian_scratch")


@pytest.fixture(scope="session")
def backbone(tiny_folder_of: Callable[[str], Path]) -> KeyedModel:
    """A backbone on the tiny Marian model, whose keys go into datastores."""
    return load_model(str(tiny_folder_of("marian")), device="cpu")


@pytest.fixture(scope="session")
def domain(marian_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> "Domain":
    """What the scripts make of a small corpus."""
    from script_runs import make_domain  # here: it imports every script

    return make_domain(tmp_path_factory.mktemp("domain"), marian_folder)
