"""Training on stored states gives the numbers of ordinary training, and keys without running the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_causal import TINY_CAUSAL
from tiny_models import TINY_FAMILIES, TinyFamily
from tiny_stores import by_place, harm_file, write_corpus
from torch.nn import functional as F
from training_runs import batch_of, column, data_options, fit

import build_index
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.backbone.pretrained import PretrainedModel
from lightning_knnmt.building import rekey as rekeying
from lightning_knnmt.building.config import RekeyConfig
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.rekey import rekey
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.training import Schedule, TranslationModule
from lightning_knnmt.training.stored_states import StoredStates

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI.s args parameter", "ignore:Found .* in eval mode", "ignore:.*tied layer", "ignore:The dirpath"
)
FolderOf = Callable[[str], Path]
DROPOUTS = ("dropout", "activation_dropout", "attention_dropout", "dropout_rate")
# of one length each, and a target that is longer than its source decides how full a batch is in both ways
TARGETS = ["Save the document before you close the window.", "Click on the button Cancel to go back.", "Open the file."]
PAIRS = [Pair(f"Öffnen {number}", f"{TARGETS[number % 3]} {TARGETS[number % 2]}", "page") for number in range(24)]


def still(folder: Path, to: Path) -> Path:
    """A model without dropout."""
    shutil.copytree(folder, to)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, **{name: 0.0 for name in DROPOUTS if name in config}}))
    return to


def states_of(model: Path, folder: Path, pairs: list[Pair] = PAIRS, shard_pairs: int = 8, **languages: str) -> Path:
    """A datastore of the states of some pairs, in several shards."""
    backbone = load_model(str(model), key_type="ffn_residual", device="cpu", **languages)
    corpus = write_corpus(folder.parent / f"{folder.name}.jsonl", pairs)
    build_datastore(backbone, DatastoreConfig(folder, corpus, max_tokens=256, shard_pairs=shard_pairs))
    return folder


def fine_tuned(folder: Path, to: Path, **languages: str) -> Path:
    """A model whose last block was changed at random."""
    model = load_model(str(folder), device="cpu", **languages)
    assert isinstance(model, PretrainedModel)
    model.freeze_below_output()
    torch.manual_seed(3)
    with torch.no_grad():
        for weights in (each for each in model.parameters() if each.requires_grad):
            weights.add_(0.05 * torch.randn_like(weights))
    model.save(to)
    return to


# ---- what follows the states


@pytest.mark.parametrize("rank", [None, 2])
def test_the_states_give_the_outputs_and_the_gradients_of_the_whole_model(
    tiny_folder: Path, tiny_family: TinyFamily, rank: int | None, tmp_path: Path
) -> None:
    folder = still(tiny_folder, tmp_path / "still")
    below = load_model(str(folder), key_type="ffn_residual", device="cpu", **tiny_family.languages)
    trainable = "last_block" if rank is None else "adapters"
    config = BackboneConfig(str(folder), device="cpu", **tiny_family.languages)
    torch.manual_seed(5)
    module = TranslationModule(config, Schedule(1e-3, 1), trainable=trainable, adapter_rank=rank or 16)  # type: ignore[arg-type]
    module.train()
    batch = batch_of(below)
    with torch.inference_mode():
        states = below.keys(batch)[batch.target_mask].clone()
    whole, labels = module.states(batch)
    gradients = []
    for outputs in (whole, module.backbone.outputs(states.clone())):  # type: ignore[attr-defined]
        module.zero_grad()
        F.cross_entropy(module.backbone.project(outputs), labels).backward()
        found = {name: each.grad.clone() for name, each in module.named_parameters() if each.grad is not None}
        gradients.append((outputs.detach(), found))
    torch.testing.assert_close(gradients[1][0], gradients[0][0], rtol=1e-5, atol=1e-5)
    assert gradients[0][1].keys() == gradients[1][1].keys() and gradients[0][1]
    for name, gradient in gradients[0][1].items():
        torch.testing.assert_close(gradients[1][1][name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert module.backbone.frozen_fingerprint == below.model_fingerprint  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", TINY_CAUSAL)
def test_states_of_language_models_give_their_outputs(name: str, tmp_path: Path) -> None:
    TINY_CAUSAL[name](tmp_path / "model")
    below, whole = (
        load_model(str(tmp_path / "model"), key_type=key_type, device="cpu")
        for key_type in ("ffn_residual", "decoder_output")
    )
    batch = whole.batch(["Choose File, then ", ""], ["Save.", "Printing is easy"])
    with torch.inference_mode():
        outputs = whole.outputs(below.keys(batch))  # type: ignore[attr-defined]
        torch.testing.assert_close(outputs[batch.target_mask], whole.keys(batch)[batch.target_mask])
    tuned = load_model(str(fine_tuned(tmp_path / "model", tmp_path / "tuned")), key_type="ffn_residual", device="cpu")
    assert tuned.model_fingerprint == below.model_fingerprint
    assert tuned.model_fingerprint != whole.model_fingerprint


def test_a_model_fine_tuned_above_its_states_has_their_fingerprint_and_another_has_not(
    tiny_folder: Path, tiny_family: TinyFamily, tmp_path: Path
) -> None:
    before = load_model(str(tiny_folder), key_type="ffn_residual", device="cpu", **tiny_family.languages)
    tuned = fine_tuned(tiny_folder, tmp_path / "tuned", **tiny_family.languages)
    after = load_model(str(tuned), key_type="ffn_residual", device="cpu", **tiny_family.languages)
    assert after.model_fingerprint == before.model_fingerprint
    with torch.no_grad():
        next(weights for name, weights in after.named_parameters() if "encoder" in name and weights.ndim > 1).add_(0.1)
    del after.__dict__["frozen_fingerprint"], after.__dict__["model_fingerprint"]
    assert after.model_fingerprint != before.model_fingerprint


# ---- training


@pytest.mark.parametrize("name", ["marian", "m2m100", "t5", "firefox"])
def test_a_run_on_stored_states_logs_the_numbers_of_a_run_of_the_whole_model(
    tiny_folder_of: FolderOf, name: str, tmp_path: Path
) -> None:
    family = TINY_FAMILIES[name]
    model = still(tiny_folder_of(name), tmp_path / "still")
    options = [
        "--model.trainable=last_block", "--model.dispersion=SlicedDispersion", "--model.label_smoothing=0.1",
        *(f"--model.backbone.{option}={code}" for option, code in family.languages.items()),
        "--trainer.callbacks=lightning_knnmt.training.IndexHealth", "--trainer.callbacks.nlist=4",
        "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null", "--data.validation_max_tokens=300",
    ]  # fmt: skip
    data = data_options(tmp_path / "data", PAIRS[:18], PAIRS[18:])
    ordinary = fit(tmp_path / "ordinary", model, data, *options)
    stored = [
        f"--data.{part}={states_of(model, tmp_path / part, pairs, **family.languages)}"
        for part, pairs in (("train", PAIRS[:18]), ("validation", PAIRS[18:]))
    ]
    rows = fit(tmp_path / "stored", model, stored, *options)
    for value in ("train/loss", "train/dispersion", "train/translation_loss", "train/tokens", "val/loss"):
        assert column(rows, value) == pytest.approx(column(ordinary, value), rel=1e-4), value
    assert len(column(rows, "train/loss_step") or column(rows, "train/loss")) == 4
    assert len(set(column(rows, "val/loss"))) == 2 == len(column(rows, "val/imbalance_factor"))
    one, other = (
        load_model(str(tmp_path / run / "model"), device="cpu", **family.languages).state_dict()
        for run in ("ordinary", "stored")
    )
    for weights in one:
        torch.testing.assert_close(other[weights], one[weights], rtol=1e-3, atol=2e-3, msg=weights)


@pytest.fixture(scope="module")
def marian_states(tiny_folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """States of the tiny Marian model."""
    return states_of(tiny_folder_of("marian"), tmp_path_factory.mktemp("marian") / "states")


def test_states_are_read_by_pair_in_the_order_of_the_corpus(tiny_folder_of: FolderOf, marian_states: Path) -> None:
    model = load_model(str(tiny_folder_of("marian")), device="cpu")
    assert isinstance(model, PretrainedModel)
    stored = StoredStates(marian_states, model)
    ids = model.tokenize([pair.src for pair in PAIRS], [pair.tgt for pair in PAIRS]).tgt
    assert len(stored) == len(PAIRS) and stored.lengths == [len(row) for row in ids]
    batch = stored.collate([stored[number] for number in (20, 0, 7)])
    assert batch.labels.tolist() == [*ids[20], *ids[0], *ids[7]]
    assert batch.states.dtype == torch.float32 and batch.states.shape == (len(batch), model.key_size)
    with Datastore(marian_states) as store:
        assert len(store.manifest.shards) > 1


def test_states_of_another_model_and_a_module_that_trains_more_are_refused(
    tiny_folder_of: FolderOf, marian_states: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [f"--data.train={marian_states}", f"--data.validation={marian_states}"]
    for name, option, message in (
        ("marian", "all", "stored states, but trainable is 'all'; expected last_block or adapters"),
        ("marian_scratch", "last_block", "holds no states of the model"),
    ):
        with pytest.raises(SystemExit):
            fit(tmp_path / name, tiny_folder_of(name), data, f"--model.trainable={option}")
        assert message in capsys.readouterr().err


# ---- keys


@pytest.mark.parametrize("name", ["marian", "m2m100", "t5", "fsmt", "firefox"])
def test_rekeying_gives_the_datastore_that_the_whole_model_builds(
    tiny_folder_of: FolderOf, name: str, tmp_path: Path
) -> None:
    folder, languages = tiny_folder_of(name), TINY_FAMILIES[name].languages
    states = states_of(folder, tmp_path / "states", **languages)
    tuned = load_model(str(fine_tuned(folder, tmp_path / "tuned", **languages)), device="cpu", **languages)
    built = rekey(tuned, RekeyConfig(states, tmp_path / "rekeyed"))
    corpus = write_corpus(tmp_path / "corpus.jsonl", PAIRS)
    config = DatastoreConfig(tmp_path / "built", corpus, max_tokens=256, shard_pairs=8)
    build_datastore(tuned, config)
    assert built.encoded == built.manifest.entries and verify(tmp_path / "rekeyed") == []
    with Datastore(tmp_path / "rekeyed") as ours, Datastore(tmp_path / "built") as theirs:
        assert ours.manifest.provenance == theirs.manifest.provenance
        assert len(ours.manifest.shards) == len(theirs.manifest.shards) > 1
        found, expected = by_place(ours, PAIRS), by_place(theirs, PAIRS)
        assert found.keys() == expected.keys()
        for place, (value, key) in expected.items():
            assert found[place][0] == value
            np.testing.assert_allclose(found[place][1], key, rtol=4e-3, atol=4e-3)
        ours.check(tuned)


def test_rekeying_is_resumed_kept_and_refused(
    tiny_folder_of: FolderOf, marian_states: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned = load_model(str(fine_tuned(tiny_folder_of("marian"), tmp_path / "tuned")), device="cpu")
    whole = rekey(tuned, RekeyConfig(marian_states, tmp_path / "whole"))
    write, calls = rekeying._write, []

    def stop(*args: object) -> None:
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(rekeying, "_write", stop)
    config = RekeyConfig(marian_states, tmp_path / "store")
    with pytest.raises(KeyboardInterrupt):
        rekey(tuned, config)
    assert not (tmp_path / "store" / "manifest.json").exists()
    built = rekey(tuned, config)
    assert built.manifest.shards == whole.manifest.shards and 0 < built.encoded < built.manifest.entries
    assert rekey(tuned, config).kept
    with pytest.raises(DatastoreError, match="already holds another datastore: model"):
        rekey(load_model(str(tiny_folder_of("marian")), device="cpu"), config)
    other = load_model(str(tiny_folder_of("marian_scratch")), device="cpu")
    with pytest.raises(ValueError, match=r"which does not fit the model .*: model"):
        rekey(other, RekeyConfig(marian_states, tmp_path / "other"))
    with pytest.raises(ValueError, match="expected another"):
        RekeyConfig(marian_states, marian_states)


def test_damaged_states_become_no_keys(tiny_folder_of: FolderOf, marian_states: Path, tmp_path: Path) -> None:
    states = shutil.copytree(marian_states, tmp_path / "states")
    harm_file(states / "shard-00001.h5", "changed")
    with pytest.raises(DatastoreError, match="is damaged"):
        rekey(load_model(str(tiny_folder_of("marian")), device="cpu"), RekeyConfig(states, tmp_path / "store"))


def test_the_commands_store_states_and_make_keys_of_them(
    tiny_folder_of: FolderOf, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, corpus = tiny_folder_of("marian"), write_corpus(tmp_path / "corpus.jsonl", PAIRS)
    (tmp_path / "build.yaml").write_text(
        f"backbone: {{model: {model}}}\ndatastore: {{corpus: {{path: {corpus.path}}}}}\n"
    )
    states, store = tmp_path / "states", tmp_path / "store"
    build_index.main(["states", "--config", str(tmp_path / "build.yaml"), "--datastore.folder", str(states)])
    tuned = fine_tuned(model, tmp_path / "tuned")
    options = ["--backbone.model", str(tuned), "--datastore.states", str(states), "--datastore.folder", str(store)]
    build_index.main(["rekey", *options, "--index.factory", "IVF4,Flat", "--index.metric", "cos"])
    assert (store / "index.faiss").exists() and "encode" in json.loads((store / "build.json").read_text())
    # building from the corpus finds nothing left to do
    build = ["build", "--config", str(tmp_path / "build.yaml"), "--backbone.model", str(tuned)]
    before = (store / "manifest.json").stat().st_mtime_ns
    build_index.main(
        [*build, "--datastore.folder", str(store), "--index.factory", "IVF4,Flat", "--index.metric", "cos"]
    )
    assert (store / "manifest.json").stat().st_mtime_ns == before
