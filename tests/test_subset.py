"""Search among the tokens of similar sentences against plain loops and against search in the whole store."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from script_runs import DECODING, Domain, expect_error, run, write_config
from tiny_stores import build_store, clumpy_keys, corpus_pairs, write_store

import build_index
import evaluate
import translate
from lightning_knnmt import build_memory, load_model, load_translator
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.config import SentencesConfig
from lightning_knnmt.building.index import build_index as build
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.building.sentences import build_sentences
from lightning_knnmt.cli import run_script
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.evaluation.explanation import explain
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.mixture import Mixture
from lightning_knnmt.knn.pair_memory import PairMemory
from lightning_knnmt.knn.retrievers.subset import Subset
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import DatastoreMemory, open_memory

ENTRIES, SIZE = 600, 16
FACTORIES = ["IVF4,PQ4np", "OPQ4,IVF4,PQ4np", "PQ4np", "Flat", "IVF4,SQ8", "IVF4,PQ4np ip", "OPQ4,IVF4,PQ4np cos"]
FACTORIES += ["Flat ip", "IVF4,Flat cos"]


class Texts:
    """A batch of which only the source texts matter."""

    def __init__(self, *texts: str) -> None:
        self.source_texts = texts


@pytest.fixture(scope="module")
def memories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, DatastoreMemory]]:
    """A store of 600 sentences of one entry each, `source 0` to `source 599`, with an index of each kind."""
    folder = tmp_path_factory.mktemp("subset") / "store"
    with write_store(folder, *clumpy_keys(ENTRIES, SIZE), [250, 350]) as store:
        build_sentences(store, SentencesConfig("bm25"))
        for number, factory in enumerate([*FACTORIES, "IVF4,PQ4x4fs"]):
            name, _, metric = factory.partition(" ")
            build(store, IndexConfig(name, name=f"i{number}", metric=metric or "l2"))  # type: ignore[arg-type]
    opened = {factory: open_memory(folder, f"i{n}") for n, factory in enumerate([*FACTORIES, "IVF4,PQ4x4fs"])}
    yield opened
    for memory in opened.values():
        memory.close()


def bound(retriever: Subset, memory: Any, *texts: str) -> Subset:
    retriever.bind(SimpleNamespace(device=torch.device("cpu")), memory)  # type: ignore[arg-type]
    retriever.begin(Texts(*texts))  # type: ignore[arg-type]
    return retriever


def asked(rows: int, sentence: list[int], seed: int = 5) -> Step:
    keys = clumpy_keys(ENTRIES, SIZE)[0].astype(np.float32)
    queries = torch.from_numpy(keys[np.random.default_rng(seed).choice(ENTRIES, rows)] + 0.5)
    return Step(queries, torch.zeros(rows, 50), torch.tensor(sentence))


@pytest.mark.parametrize("factory", FACTORIES)
def test_a_subset_of_everything_is_the_whole_store(factory: str, memories: dict[str, DatastoreMemory]) -> None:
    memory, step = memories[factory], asked(5, [0, 1, 1, 0, 1])
    found = bound(Subset(k=7, sentences=10**6), memory, "source", "some source")(step)
    expected = memory.search(step.queries, 7, nprobe=100)
    tolerance = (0.05, 0.3) if "SQ8" in factory else (1e-4, 1e-2)
    torch.testing.assert_close(found.distances, expected.distances, rtol=tolerance[0], atol=tolerance[1])
    if "SQ8" not in factory:  # compared by stored keys
        assert torch.equal(found.ids.sort(1).values, expected.ids.sort(1).values)
    assert torch.equal(found.values, memory.values_of(found.ids))


@pytest.mark.parametrize("factory", ["IVF4,PQ4np", "IVF4,PQ4x4fs", "Flat"])
@pytest.mark.parametrize("exact", [False, True])
def test_rows_search_the_tokens_of_their_own_sentence_s_neighbors(
    factory: str, exact: bool, memories: dict[str, DatastoreMemory]
) -> None:
    memory = memories[factory]
    texts = ["source 17 3 250", "source 599 0", "17"]
    owners = [[17, 3, 250], [599, 0], [17]]
    step = asked(6, [2, 0, 1, 0, 0, 1])
    found = bound(Subset(k=2, sentences=3, exact=exact), memory, texts[0], "599 0", texts[2])(step)
    for row in range(6):
        own = torch.tensor(sorted(owners[int(step.sentence[row])]))
        keys = memory.keys_of(own)
        if not exact and (codes := memory.product_codes()) is not None:
            query = codes.transformed(step.queries[row : row + 1])
            distances = codes.take(own).distances(query, codes.tables(query))[0]
        else:
            distances = (keys - step.queries[row]).square().sum(1)
        order = distances.argsort()[:2]
        some = len(order)
        torch.testing.assert_close(found.distances[row, :some], distances[order], rtol=1e-4, atol=1e-3)
        assert torch.equal(found.ids[row, :some], own[order])
        assert torch.equal(found.values[row, :some], memory.values_of(own[order]))
        assert (found.ids[row, some:] == -1).all() and found.distances[row, some:].isinf().all()
        assert (found.values[row, some:] == 0).all()


def test_rescored_candidates_have_the_distances_of_stored_keys(memories: dict[str, DatastoreMemory]) -> None:
    step = asked(4, [0, 0, 1, 1])
    texts = ("source", "source 5")
    exact = bound(Subset(k=5, sentences=1000, exact=True), memories["IVF4,PQ4x4fs"], *texts)(step)
    rescored = bound(Subset(k=5, sentences=1000, rescore=600), memories["IVF4,PQ4x4fs"], *texts)(step)
    torch.testing.assert_close(rescored.distances, exact.distances, rtol=1e-4, atol=1e-3)
    assert torch.equal(rescored.ids, exact.ids) and torch.equal(rescored.values, exact.values)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("rescore", [0, 4])
def test_a_sentence_like_none_has_no_neighbors(exact: bool, rescore: int, memories: dict[str, DatastoreMemory]) -> None:
    retriever = bound(Subset(k=3, exact=exact, rescore=rescore), memories["IVF4,PQ4np"], "nothing", "17")
    found = retriever(asked(3, [0, 1, 0]))
    assert found.found.tolist() == [False, True, False]
    assert found.ids[1].tolist() == [17, -1, -1] and found.distances.shape == (3, 3)
    assert len(retriever(asked(0, []).rows(torch.zeros(0, dtype=torch.bool))).ids) == 0


def test_a_memory_in_ram_is_searched_exactly_by_bm25() -> None:
    keys, values = torch.randn(9, 4, generator=torch.Generator().manual_seed(2)), torch.arange(9)
    from lightning_knnmt.knn.memory import RamMemory

    memory = RamMemory(keys, values, [Pair("a b", "x"), Pair("b c", "y"), Pair("d", "z")], [2, 4, 3])
    retriever = bound(Subset(k=5, sentences=2), memory, "b", "d e", "f")
    step = Step(torch.randn(3, 4), torch.zeros(3, 9), torch.tensor([0, 1, 2]))
    found = retriever(step)
    for row, own in ((0, range(6)), (1, range(6, 9))):
        entries = torch.tensor(own)
        distances = (keys[entries] - step.queries[row]).square().sum(1)
        order = distances.argsort()[:5]
        assert found.ids[row, : len(order)].tolist() == entries[order].tolist()
        torch.testing.assert_close(found.distances[row, : len(order)], distances[order])
    assert not found.found[2]


def test_removed_sentences_never_come_back(tmp_path: Path, backbone: KeyedModel) -> None:
    folder = tmp_path / "store"
    with build_store(backbone, folder, corpus_pairs(30)) as store:
        build(store, IndexConfig("IVF2,PQ4x4np", train_points=100))
        build_sentences(store, SentencesConfig("tf_idf"))
    remove_documents(folder, ["page-1"])
    with open_memory(folder) as memory:
        retriever = Subset(k=5000, sentences=100)
        mixture = Mixture(backbone, memory, retriever, FixedCombiner())
        batch = backbone.batch([pair.src for pair in corpus_pairs(30)[:6]])
        mixture.begin(batch)
        step = Step(torch.randn(6, backbone.key_size), torch.zeros(6, backbone.vocabulary_size), torch.arange(6))
        found = mixture.neighbors(step)
        for row in range(6):
            documents = {memory.context(entry).pair.document for entry in found.ids[row].tolist() if entry >= 0}
            assert documents == {"page-0", "page-2"}


@pytest.fixture
def config(domain: Domain, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    run_script(build_index.COMMANDS, build_index.spell_out(["sentences", str(domain.root / "store")]))
    retriever = {"class_path": "lightning_knnmt.knn.retrievers.subset.Subset", "init_args": {"k": 3, "sentences": 4}}
    return {
        "backbone": {"model": str(domain.model), "device": "cpu"}, "datastore": str(domain.root / "store"),
        "decoding": DECODING, "retriever": retriever, "knn": {"lambda_": 0.6, "temperature": 5.0},
    }  # fmt: skip


def test_scripts_take_a_subset_by_yaml_alone(domain: Domain, config: dict[str, Any], tmp_path: Path) -> None:
    grid = {"k": [1, 3], "lambda_": [0.3, 0.7], "temperature": [5.0], "finalists": 2, "others": {"sentences": [1, 8]}}
    evaluation = config | {
        "test": {"path": domain.root / "data" / "test.jsonl"},
        "tuning": {"validation": {"path": domain.root / "data" / "validation.jsonl"}, "grid": grid},
        "repeats": 1,
        "out": tmp_path / "out",
    }
    run(evaluate.evaluate, "--config", write_config(tmp_path / "evaluate.yaml", evaluation))
    results = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert results["tuning"]["tried"] == 2 * 2 * 2
    assert results["systems"]["knn"]["bleu"] > results["systems"]["base"]["bleu"]
    written = tmp_path / "out" / "translate.yaml"
    retriever = yaml.safe_load(written.read_text(encoding="utf-8"))["retriever"]
    assert retriever["class_path"].endswith("Subset") and retriever["init_args"]["sentences"] in (1, 8)
    translator = load_translator(written)
    assert isinstance(translator.mixture, Mixture) and isinstance(translator.mixture.retriever, Subset)
    expected = translator.translate(domain.sources("test")).texts
    (tmp_path / "in.txt").write_text("".join(f"{line}\n" for line in domain.sources("test")), encoding="utf-8")
    run(translate.translate, "--config", written, "--input", tmp_path / "in.txt", "--output", tmp_path / "out.txt")
    assert (tmp_path / "out.txt").read_text(encoding="utf-8").splitlines() == expected
    assert explain(translator.mixture, domain.sources("test")[0], translator.decoding).tokens[0].neighbors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sentences": 0}, "sentences is 0, expected 1 or more"),
        ({"k": 0}, "k is 0, expected 1 or more"),
        ({"rescore": 2}, "rescore is 2, expected 0, or k = 3 candidates or more"),
        ({"sentence_index": "other"}, "no sentence index called 'other'"),
    ],
)
def test_what_does_not_fit_is_refused(
    options: dict[str, Any], message: str, config: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config["retriever"]["init_args"] |= options
    path = write_config(tmp_path / "translate.yaml", config)
    capsys.readouterr()
    expect_error(capsys, translate.translate, "--config", path, "--input", path, expected=message)


def test_a_memory_without_stored_keys_is_refused(marian_folder: Path) -> None:
    model = load_model(str(marian_folder), device="cpu")
    with pytest.raises(ValueError, match="PairMemory has no stored sentences with keys"):
        Mixture(model, PairMemory(model, []), Subset(), FixedCombiner())
    assert Mixture(model, build_memory(model, ["a"], ["b"]), Subset(), FixedCombiner())
