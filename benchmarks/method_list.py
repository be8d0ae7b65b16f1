"""The methods that are compared, read from a YAML file, and the file that each is tuned to."""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import common  # noqa: F401, finds the package
import yaml
from jsonargparse import ArgumentParser

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.decoding import Decoding
from lightning_knnmt.evaluation.tuning import Grid
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.gates import Gate
from lightning_knnmt.knn.retrievers.retriever import Retriever
from lightning_knnmt.knn.settings import KnnSettings, MixtureConfig
from lightning_knnmt.loading import open_translator


@dataclass(frozen=True)
class Method:
    """How a method's mixture is made.

    Attributes:
        title: What it is, in a few words.
        knn: The usual search and mixture, where no class is chosen below.
        retriever: Where neighbors come from.
        combiner: How they are mixed in.
        gate: Which rows search.
        datastore: Its folder; None: the whole store.
        index: Name of the index.
        files: Patterns of the files in the datastore's folder that a search reads.
        like: The method whose tuned options it begins with; None: with those given here.
        grid: Options to tune; a list that is left out is not tuned. None: nothing is tuned.
        seeds: Seeds that `${seed}` stands for, each measured; none: there is nothing random.
    """

    title: str
    knn: KnnSettings = KnnSettings()
    retriever: Retriever | None = None
    combiner: Combiner | None = None
    gate: Gate | None = None
    datastore: Path | None = None
    index: str = "index"
    files: list[str] = field(default_factory=lambda: ["index*.faiss"])
    like: str | None = None
    grid: dict[str, Any] | None = None
    seeds: list[int] = field(default_factory=list)

    @property
    def mixture(self) -> MixtureConfig:
        """Retriever, combiner and gate."""
        return MixtureConfig.of(self.knn, self.retriever, self.combiner, self.gate)

    def begin(self, tuned: dict[str, MixtureConfig]) -> MixtureConfig:
        """The mixture to be tuned, with the options of the method that it is `like`, where it has such."""
        if self.like is None:
            return self.mixture
        other = {name: value for part in tuned[self.like].parts for name, value in part.options.items()}
        known = {name for part in self.mixture.parts for name in part.option_names}
        return self.mixture.with_options(**{name: value for name, value in other.items() if name in known})

    def full_grid(self, mixture: MixtureConfig, max_tokens: int, finalists: int) -> Grid:
        """The values to try: those given, and for other options that the mixture has, its own."""
        given = dict(self.grid or {})
        own = {name: [value] for part in mixture.parts for name, value in part.options.items()}
        kept: dict[str, Any] = {name: own[name] for name in ("k", "lambda_", "nprobe") if name in own}
        if "temperature" in own and self.like is not None:
            kept["temperature"] = own["temperature"]
        return Grid(**{**kept, "max_tokens": max_tokens, "finalists": finalists, **given})

    def quick(self) -> "Method":
        """The same with the first and the last value of each list."""
        if self.grid is None:
            return self
        ends = {name: _ends(values) for name, values in self.grid.items() if name != "others"}
        others = {name: _ends(values) for name, values in self.grid.get("others", {}).items()}
        return replace(self, grid=ends | {"others": others}, seeds=self.seeds[:1])


def _ends(values: Any) -> Any:
    return [values[0], values[-1]] if isinstance(values, list) and len(values) > 1 else values


def read_methods(path: Path, **words: str) -> dict[str, Method]:
    """Methods by name; those with seeds once for each, as NAME-SEED.

    Args:
        path: A file such as methods.yaml.
        words: What stands for `${store}` and the like.

    Raises:
        ValueError: An option is unknown or does not fit.
    """
    text = path.read_text(encoding="utf-8")
    methods = {}
    for name, options in yaml.safe_load(text).items():
        for seed in options.get("seeds") or [None]:
            filled = Template(yaml.safe_dump(options)).safe_substitute(words, seed=seed)
            methods[name if seed is None else f"{name}-{seed}"] = parse_method(name, yaml.safe_load(filled))
    if unknown := {method.like for method in methods.values()} - {None, *methods}:
        raise ValueError(f"like is {', '.join(map(str, unknown))}, expected the name of a method in {path}")
    return methods


def parse_method(name: str, options: dict[str, Any]) -> Method:
    """A method of its options.

    Raises:
        ValueError: An option is unknown or does not fit.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Method)
    try:
        return Method(**parser.instantiate_classes(parser.parse_object(options)))
    except Exception as error:
        raise ValueError(f"{name} is no method: {error}") from error


def translate_file(
    path: Path, backbone: BackboneConfig, method: Method, store: Path, mixture: MixtureConfig, decoding: Decoding
) -> None:
    """Write the configuration with which `translate.py` translates by a tuned method."""
    from evaluate import translate_config

    text = translate_config(backbone, method.datastore or store, method.index, mixture, decoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {method.title}: written by benchmarks/methods.py\n{text}\n", encoding="utf-8")


def read_translate_file(path: Path) -> MixtureConfig:
    """The mixture of such a file."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(open_translator, skip={"start"})
    options = parser.instantiate_classes(parser.parse_path(str(path)))
    return MixtureConfig.of(options.knn, options.retriever, options.combiner, options.gate)


def with_likes(methods: dict[str, Method], chosen: set[str]) -> dict[str, Method]:
    """The methods that are chosen, by their names without seeds, and those that they begin with."""
    kept: set[str] = set()
    for name, method in reversed(methods.items()):
        if without_seed(name) in chosen or name in kept:
            kept |= {name} | ({method.like} if method.like else set())
    return {name: method for name, method in methods.items() if name in kept}


def without_seed(name: str) -> str:
    """The method's name, for all its seeds.

    >>> without_seed("adaptive-3")
    'adaptive'
    """
    return re.sub(r"-\d+$", "", name)
