"""The methods that are compared, read from a YAML file, and the file that each is tuned to."""

import re
from collections.abc import Collection, Mapping
from contextlib import chdir
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from string import Template
from typing import Any

import common  # noqa: F401, finds the package
import yaml
from jsonargparse import ArgumentParser

from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.data.readers import CorpusFile
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
        translation_memory: Pairs that are searched in place of a datastore.
        index: Name of the index.
        files: Patterns of the files in the datastore's folder that a search reads.
        like: The method whose tuned options it begins with; None: with those given here.
        grid: Options to tune; a list that is left out is not tuned. None: nothing is tuned.
        tune_scale: Tune the options that are distances, too, where they come from another method.
    """

    title: str
    knn: KnnSettings = KnnSettings()
    retriever: Retriever | None = None
    combiner: Combiner | None = None
    gate: Gate | None = None
    datastore: Path | None = None
    translation_memory: CorpusFile | None = None
    index: str = "index"
    files: list[str] = field(default_factory=lambda: ["index*.faiss"])
    like: str | None = None
    grid: dict[str, Any] | None = None
    tune_scale: bool = False

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
        if "temperature" in own and self.like is not None and not self.tune_scale:
            kept["temperature"] = own["temperature"]
        return Grid(**{**kept, "max_tokens": max_tokens, "finalists": finalists, **given})

    def quick(self) -> "Method":
        """The same with the first and the last value of each list."""
        if self.grid is None:
            return self
        ends = {name: _ends(values) for name, values in self.grid.items() if name != "others"}
        others = {name: _ends(values) for name, values in self.grid.get("others", {}).items()}
        return replace(self, grid=ends | {"others": others})


def _ends(values: Any) -> Any:
    return [values[0], values[-1]] if isinstance(values, list) and len(values) > 1 else values


def read_methods(
    path: Path, words: Mapping[str, str], chosen: Collection[str] = (), quick: bool = False, make: bool = True
) -> dict[str, Method]:
    """Methods by name; those with `seeds` once for each, as NAME-SEED.

    Args:
        path: A file such as methods.yaml.
        words: What stands for `${store}` and the like.
        chosen: Names without seeds of the methods that are wanted; those that they are `like` come too. None: all.
        quick: Read the first seed only, and train for two epochs.
        make: Run the `command` of each method whose `needs` are not there.

    Raises:
        ValueError: An option is unknown or does not fit.
    """
    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    likes = {name: options.get("like") for name, options in listed.items()}
    if unknown := sorted(({*chosen, *likes.values()} - {None}) - set(listed)):
        raise ValueError(f"{', '.join(map(str, unknown))} is no method of {path}, expected some of {', '.join(listed)}")
    wanted = {*(chosen or listed)}
    for name in reversed(listed):
        if name in wanted and likes[name]:
            wanted.add(likes[name])
    methods = {}
    for name in [name for name in listed if name in wanted]:
        seeds = listed[name].pop("seeds", [None])
        for seed in seeds[:1] if quick else seeds:
            filled = yaml.safe_load(Template(yaml.safe_dump(listed[name])).safe_substitute(words, seed=seed))
            needs, command = filled.pop("needs", None), filled.pop("command", [])
            if make and needs and not Path(needs).exists():
                _run(" ".join(command).split(), quick)
            method = parse_method(name, filled)
            methods[name if seed is None else f"{name}-{seed}"] = method.quick() if quick else method
    return methods


def _run(command: list[str], quick: bool) -> None:
    """Call a script of the repository, in its folder."""
    script, *arguments = command
    shorter = ["--trainer.max_epochs", "2"] if quick and script == "train.py" else []
    with chdir(Path(__file__).resolve().parents[1]):
        import_module(script.removesuffix(".py")).main([*arguments, *shorter])


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

    searched = method.translation_memory or method.datastore or store
    text = translate_config(backbone, searched, method.index, mixture, decoding)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {method.title}: written by benchmarks/methods.py\n{text}\n", encoding="utf-8")


def read_translate_file(path: Path) -> MixtureConfig:
    """The mixture of such a file."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_function_arguments(open_translator, skip={"start"})
    options = parser.instantiate_classes(parser.parse_path(str(path)))
    return MixtureConfig.of(options.knn, options.retriever, options.combiner, options.gate)


def without_seed(name: str) -> str:
    """The method's name, for all its seeds.

    >>> without_seed("adaptive-3")
    'adaptive'
    """
    return re.sub(r"-\d+$", "", name)
