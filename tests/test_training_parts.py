"""Trainings of combiners and gates: what they are trained on, that they learn, and what they leave behind."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from script_runs import DECODING, Domain, run, write_config
from tiny_stores import build_store, corpus_pairs
from training_runs import ROOT, column, logged

import evaluate
import train
import translate
from lightning_knnmt.backbone.config import load_model
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.index import build_index
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index
from lightning_knnmt.knn.combiners.adaptive import AdaptiveCombiner
from lightning_knnmt.knn.combiners.combiner import Combiner
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.combiners.kernel import KernelCombiner
from lightning_knnmt.knn.combiners.robust import RobustCombiner
from lightning_knnmt.knn.gates import LearnedGate
from lightning_knnmt.knn.reference import reference_steps
from lightning_knnmt.knn.retrievers.whole_store import WholeStore
from lightning_knnmt.memory import DatastoreMemory
from lightning_knnmt.training.parts_command_line import part_in
from lightning_knnmt.training.steps import searched_steps, stored_pairs

pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI.s args parameter", "ignore:Found .* in eval mode")
COMBINERS = "lightning_knnmt.knn.combiners"
HELD_OUT = corpus_pairs(12, seed=5)
CONFIGS = [*sorted((ROOT / "configs" / "combiners").glob("*.yaml")), ROOT / "configs" / "gates" / "learned.yaml"]


@pytest.fixture(scope="module")
def marian(marian_folder: Path) -> KeyedModel:
    return load_model(str(marian_folder), device="cpu")


@pytest.fixture(scope="module")
def memory(marian: KeyedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DatastoreMemory]:
    with build_store(marian, tmp_path_factory.mktemp("parts") / "store", corpus_pairs(30), 10) as store:
        build_index(store, IndexConfig("Flat"))
        yield DatastoreMemory(store, open_index(store))


# ---- steps


@pytest.mark.parametrize(
    "make",
    [
        lambda: FixedCombiner(0.6, 50.0),
        lambda: AdaptiveCombiner(4),
        lambda: KernelCombiner(),
        lambda: RobustCombiner(5),
    ],
)
def test_few_columns_give_the_log_probs_of_the_whole_vocabulary(
    make: Callable[[], Combiner], marian: KeyedModel, memory: DatastoreMemory
) -> None:
    torch.manual_seed(1)
    combiner = make()
    combiner.bind(marian, memory)
    for parameter in combiner.parameters():
        torch.nn.init.normal_(parameter)
    kept = searched_steps(marian, memory, WholeStore(k=6), HELD_OUT, 64)
    retriever = WholeStore(k=6)
    retriever.bind(marian, memory)
    whole, plain = [], []
    for reference in reference_steps(marian, HELD_OUT, 64):
        step = reference.step
        whole.append(combiner.token_log_probs(step, retriever(step), reference.tokens))
        plain.append((step.logits.log_softmax(1)).gather(1, reference.tokens[:, None])[:, 0])
    torch.testing.assert_close(kept.plain_log_probs, torch.cat(plain))
    torch.testing.assert_close(combiner.token_log_probs(kept.step, kept.neighbors, kept.tokens), torch.cat(whole))
    few = kept[[5, 0, 7]]
    torch.testing.assert_close(
        combiner.token_log_probs(few.step, few.neighbors, few.tokens), torch.cat(whole)[[5, 0, 7]]
    )
    assert kept.step.logits.shape[1] == 8 + 6 + 1 < marian.vocabulary_size


def test_no_stored_entry_finds_itself_and_all_find_their_next_neighbors(
    marian: KeyedModel, memory: DatastoreMemory
) -> None:
    pairs, firsts = stored_pairs(memory.datastore, 7, seed=2)
    assert len(pairs) == len(set(firsts)) == 7
    assert (pairs, firsts) == stored_pairs(memory.datastore, 7, seed=2) != stored_pairs(memory.datastore, 7, seed=3)
    found = searched_steps(marian, memory, WholeStore(k=3), pairs, 64, firsts)
    row = 0
    for reference in reference_steps(marian, pairs, 64, cut=False):
        for pair, position, token in zip(reference.pair, reference.position, reference.tokens, strict=True):
            own = firsts[int(pair)] + int(position)
            context = memory.context(own)
            assert (context.pair, context.position) == (pairs[int(pair)], int(position))
            assert int(memory.values_of(torch.tensor([own]))) == int(token)
            every = (memory.keys_of(torch.arange(len(memory))) - found.step.queries[row]).square().sum(1)
            assert every.argmin() == own or every.min() == every[own]
            every[own] = torch.inf
            assert own not in found.neighbors.ids[row].tolist()
            torch.testing.assert_close(found.neighbors.distances[row], every.topk(3, largest=False).values)
            row += 1
    assert row == len(found) > 20


# ---- trainings


def fit(domain: Domain, folder: Path, model: dict[str, Any], *options: str) -> list[dict[str, float]]:
    """Train as by the command line, and give the rows that were logged."""
    config = {
        "model": {
            "backbone": {"model": str(domain.model), "device": "cpu"}, "datastore": str(domain.root / "store"), **model
        },
        "data": {"held_out": str(domain.root / "data" / "validation.jsonl"), "batch_size": 32},
        "trainer": {
            "default_root_dir": str(folder), "max_epochs": 8, "accelerator": "cpu", "enable_progress_bar": False,
            "enable_model_summary": False, "log_every_n_steps": 1,
        },
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    train.main(["fit", "--config", str(write_config(folder / "fit.yaml", config)), *options])
    return logged(
        max((folder / "lightning_logs").glob("version_*/metrics.csv"), key=lambda path: path.stat().st_mtime).parent
    )


CLASSES = {
    "adaptive": {"class_path": f"{COMBINERS}.adaptive.AdaptiveCombiner", "init_args": {"k": 4}},
    "kernel": {"class_path": f"{COMBINERS}.kernel.KernelCombiner", "init_args": {"k": 4}},
    "robust": {"class_path": f"{COMBINERS}.robust.RobustCombiner", "init_args": {"k": 4}},
}


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("stored", [0, 20])
def test_a_training_betters_the_likelihood_and_writes_its_best(
    name: str, stored: int, domain: Domain, tmp_path: Path
) -> None:
    rows = fit(domain, tmp_path / "run", {"combiner": CLASSES[name], "lr": 0.005}, f"--data.stored={stored}")
    losses = column(rows, "val/loss")
    assert len(losses) == 8
    assert min(losses[1:]) < losses[0] and min(losses) < column(rows, "val/plain_loss")[0]
    written = yaml.safe_load((tmp_path / "run" / "combiner" / "trained.json").read_text())
    assert written["figures"]["val/loss"] == pytest.approx(min(losses), rel=1e-5)
    if stored:
        return
    again = fit(domain, tmp_path / "again", {"combiner": CLASSES[name], "lr": 0.005})
    assert column(again, "train/loss") == column(rows, "train/loss")


def test_scripts_use_a_trained_combiner_and_gate_by_their_folders(domain: Domain, tmp_path: Path) -> None:
    fit(domain, tmp_path / "run", {"combiner": CLASSES["adaptive"]})
    combiner = {"class_path": CLASSES["adaptive"]["class_path"], "init_args": {"folder": tmp_path / "run" / "combiner"}}
    gate_class = "lightning_knnmt.knn.gates.LearnedGate"
    rows = fit(domain, tmp_path / "gated", {"gate": {"class_path": gate_class}, "combiner": combiner})
    assert min(column(rows, "val/loss")[1:]) < column(rows, "val/loss")[0]
    assert 0 <= column(rows, "val/searched")[-1] <= 1
    config: dict[str, Any] = {
        "backbone": {"model": domain.model, "device": "cpu"},
        "datastore": domain.root / "store",
        "test": {"path": domain.root / "data" / "test.jsonl"},
        "combiner": combiner,
        "gate": {"class_path": gate_class, "init_args": {"folder": tmp_path / "gated" / "gate"}},
        "tuning": {
            "validation": {"path": domain.root / "data" / "validation.jsonl"},
            "grid": {"k": [4], "nprobe": [4], "finalists": 1, "others": {"threshold": [0.0, 1000.0]}},
        },
        "decoding": DECODING,
        "repeats": 1,
        "out": tmp_path / "out",
    }
    run(evaluate.evaluate, "--config", write_config(tmp_path / "evaluate.yaml", config))
    written = yaml.safe_load((tmp_path / "out" / "translate.yaml").read_text())
    assert set(written["combiner"]["init_args"]) == {"folder", "any_store"}
    assert written["gate"]["init_args"]["threshold"] in (0.0, 1000.0)
    (tmp_path / "in.txt").write_text("\n".join(domain.sources("test")) + "\n", encoding="utf-8")
    out = tmp_path / "out.txt"
    run(
        translate.translate,
        "--config",
        tmp_path / "out" / "translate.yaml",
        "--input",
        tmp_path / "in.txt",
        "--output",
        out,
    )
    assert len(out.read_text(encoding="utf-8").splitlines()) == len(domain.sources("test"))


def test_a_learned_gate_opens_for_all_or_none_by_its_threshold_and_is_what_was_trained(
    marian: KeyedModel, memory: DatastoreMemory, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    gate = LearnedGate()
    gate.bind(marian, memory)
    for parameter in gate.parameters():
        torch.nn.init.normal_(parameter)
    kept = searched_steps(marian, memory, WholeStore(k=2), HELD_OUT, 64)
    (whole,) = (torch.cat(each) for each in [[gate(r.step) for r in reference_steps(marian, HELD_OUT, 64)]])
    assert gate(kept.step).equal(whole) and 0 < int(whole.sum()) < len(whole)
    gate.save(tmp_path / "gate", marian, memory)
    for threshold, opened in ((-torch.inf, len(whole)), (0.0, int(whole.sum())), (torch.inf, 0)):
        loaded = LearnedGate(threshold=threshold, folder=tmp_path / "gate")
        loaded.bind(marian, memory)
        assert int(loaded(kept.step).sum()) == opened
        assert loaded.with_options(threshold=1.0).threshold == 1.0
        assert loaded.options["threshold"] == threshold


def refusal(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error


def test_what_cannot_be_trained_is_refused_in_one_line(
    domain: Domain, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = {"class_path": f"{COMBINERS}.fixed.FixedCombiner"}
    for model, options, message in (
        ({"combiner": fixed}, (), "combiner is a FixedCombiner, which has nothing to train"),
        ({"combiner": CLASSES["adaptive"]}, ("--data.validation_share=0",), "validation_share is 0.0, which leaves"),
        ({"combiner": CLASSES["adaptive"]}, ("--model.lr=0",), "lr is 0.0, expected more than 0"),
        ({"combiner": CLASSES["adaptive"]}, ("--data.batch_size=0",), "batch_size is 0, expected 1 or more"),
        ({"combiner": CLASSES["adaptive"]}, ("--model.datastore=nowhere",), "nowhere"),
    ):
        assert message in refusal(capsys, lambda m=model, o=options: fit(domain, tmp_path / "run", m, *o))
    fit(domain, tmp_path / "run", {"combiner": CLASSES["adaptive"]})
    again = refusal(capsys, lambda: fit(domain, tmp_path / "run", {"combiner": CLASSES["adaptive"]}))
    assert "which is there already; name another, or give --overwrite true" in again
    fit(domain, tmp_path / "run", {"combiner": CLASSES["adaptive"]}, "--overwrite=true", "--trainer.max_epochs=1")


def test_what_a_command_line_trains_is_told_by_its_model(tmp_path: Path) -> None:
    both, neither = tmp_path / "both.yaml", ROOT / "configs" / "dispersion" / "pretix.yaml"
    both.write_text("model: {combiner: {}, gate: {}}")
    assert part_in(["fit", "--config", str(both)]) == part_in(["fit", f"--config={both}"]) == "gate"
    assert part_in(["fit", "--model.combiner", "x"]) == "combiner"
    assert part_in(["fit", "--config", str(neither)]) is part_in(["fit", "--config"]) is part_in([]) is None


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_trains_as_shipped_but_for_model_and_data(
    path: Path, domain: Domain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = yaml.safe_load(path.read_text())
    options = [
        f"--model.backbone.model={domain.model}", f"--model.datastore={domain.root / 'store'}",
        f"--data.held_out={domain.root / 'data' / 'validation.jsonl'}", "--trainer.max_epochs=1", "--data.stored=3",
    ]  # fmt: skip
    train.main(["fit", "--config", str(path), *options, "--trainer.enable_progress_bar=false"])
    assert list(Path(config["trainer"]["default_root_dir"]).glob("*/trained.json"))
