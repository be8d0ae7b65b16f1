"""k-nearest-neighbor machine translation on PyTorch Lightning, made fast by angular dispersion.

>>> from lightning_knnmt import Decoding, KnnSettings, Translator, build_memory, load_model
>>> model = load_model(tiny_model)  # a hub name or a folder; tiny_model is one of the tests
>>> memory = build_memory(model, ["Öffnen", "Das Passwort ist falsch."], ["Open", "The password is wrong."])
>>> mixture = KnnSettings(k=1, lambda_=0.9).open(model, memory)
>>> translator = Translator(model, mixture, Decoding(max_new_tokens=24))
>>> translator.translate(["Das Passwort ist falsch."]).texts
['The password is wrong.']
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

# Torch and FAISS each bring OpenMP threads; spinning ones starve the other library when cores are shared.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

__version__ = "0.1.0"

if TYPE_CHECKING:
    from lightning_knnmt.backbone.config import BackboneConfig as BackboneConfig
    from lightning_knnmt.backbone.config import load_model as load_model
    from lightning_knnmt.building.memory import build_memory as build_memory
    from lightning_knnmt.decoding import Decoding as Decoding
    from lightning_knnmt.decoding import Translator as Translator
    from lightning_knnmt.evaluation.explanation import explain as explain
    from lightning_knnmt.knn.mixture import Mixture as Mixture
    from lightning_knnmt.knn.settings import KnnSettings as KnnSettings
    from lightning_knnmt.loading import load_translator as load_translator
    from lightning_knnmt.memory import open_memory as open_memory

_EXPORTED = {
    "BackboneConfig": "backbone.config",
    "Decoding": "decoding",
    "KnnSettings": "knn.settings",
    "Mixture": "knn.mixture",
    "Translator": "decoding",
    "build_memory": "building.memory",
    "explain": "evaluation.explanation",
    "load_model": "backbone.config",
    "load_translator": "loading",
    "open_memory": "memory",
}
__all__ = ["__version__", *_EXPORTED]


def __getattr__(name: str) -> Any:
    """Import an exported name when it is first asked for, so that scripts that need none start at once."""
    if name not in _EXPORTED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_EXPORTED[name]}"), name)
