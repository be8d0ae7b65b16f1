"""Training: only what should change changes, the loss is the sum it claims to be, and resuming is exact."""

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from tiny_models import ENGLISH, GERMAN, TinyFamily
from torch import Tensor, nn
from training_runs import PAIRS, ROOT, batch_of, column, data_options, fit, logged, logits_of
from transformers import AutoModelForSeq2SeqLM

from lightning_knnmt.backbone.batch import collate
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.data.batching import divisible_batches, token_budget_batches
from lightning_knnmt.data.pairs import Pair
from lightning_knnmt.data.splits import read_split
from lightning_knnmt.training import Schedule, TranslationModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI.s args parameter", "ignore:Found .* in eval mode", "ignore:.*tied layer"
)

FolderOf = Callable[[str], Path]
SCHEDULE = Schedule(lr=1e-2, warmup_steps=1)
LAST_BLOCK = {
    "bart": ["decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layers.1.final_layer_norm", "lm_head"],
    "pegasus": ["decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layer_norm", "lm_head"],
    "mt5": ["decoder.block.1.layer.2.DenseReluDense", "decoder.final_layer_norm", "lm_head"],
    "umt5": ["decoder.block.1.layer.2.DenseReluDense", "decoder.final_layer_norm", "lm_head"],
    "firefox": ["decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layers.1.final_layer_norm", "lm_head"],
    "marian": ["decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layers.1.final_layer_norm", "lm_head"],
    "m2m_100": ["decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layer_norm", "lm_head"],
    "mbart": ["decoder.layers.1.fc1", "decoder.layers.1.fc2", "decoder.layer_norm", "lm_head"],
    "t5": ["decoder.block.1.layer.2.DenseReluDense", "decoder.final_layer_norm", "lm_head"],
    "fsmt": [
        "decoder.layers.1.fc1",
        "decoder.layers.1.fc2",
        "decoder.layers.1.final_layer_norm",
        "decoder.output_projection",
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small corpus of several batches."""
    return data_options(tmp_path_factory.mktemp("data"), PAIRS[:40], PAIRS[40:])


@pytest.fixture(scope="module")
def still_marian(tiny_folder_of: FolderOf, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Marian model without dropout."""
    folder = shutil.copytree(tiny_folder_of("marian_scratch"), tmp_path_factory.mktemp("still") / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dropout": 0.0}))
    return folder


# ---- what is trained


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trainable", ["last_block", "adapters"])
def test_only_the_way_to_the_logits_changes_and_an_export_is_the_same_function(
    tiny_name: str, tiny_folder: Path, tiny_family: TinyFamily, tmp_path: Path, trainable, tied: bool
) -> None:
    if trainable == "adapters":
        pytest.importorskip("peft")
    model = AutoModelForSeq2SeqLM.from_pretrained(tiny_folder)
    if tied and tiny_name == "fsmt":
        pytest.skip("its vocabularies differ")
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    load_model(str(tiny_folder), device="cpu", **tiny_family.languages).tokenizer.save_pretrained(tmp_path / "tied")
    model.save_pretrained(tmp_path / "tied")
    config = BackboneConfig(str(tmp_path / "tied"), **tiny_family.languages)
    module = TranslationModule(config, SCHEDULE, trainable=trainable)
    module.backbone.eval()
    original = load_model(str(tmp_path / "tied"), device="cpu", **tiny_family.languages)
    torch.testing.assert_close(logits_of(module.backbone), logits_of(original))

    optimizer = module.configure_optimizers()["optimizer"]
    module.train()
    for _ in range(3):
        states, labels = module.states(batch_of(module.backbone))
        nn.functional.cross_entropy(module.backbone.project(states), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    module.eval()
    module.backbone.save(tmp_path / "trained")

    reloaded = load_model(str(tmp_path / "trained"), device="cpu", **tiny_family.languages)
    torch.testing.assert_close(logits_of(reloaded), logits_of(module.backbone), rtol=1e-4, atol=1e-4)
    before = model.state_dict()
    after = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "trained").state_dict()
    assert before.keys() == after.keys()
    changed = {name.rsplit(".", 1)[0] for name in before if not torch.equal(before[name], after[name])}
    expected = LAST_BLOCK[model.config.model_type]
    assert all(any(part in name for part in expected) for name in changed), changed
    assert all(any(part in name for name in changed) for part in expected), changed


def test_a_projection_stays_untied_over_two_rounds_of_saving(tiny_folder_of: FolderOf, tmp_path: Path) -> None:
    backbone = load_model(str(tiny_folder_of("t5")), device="cpu")
    assert backbone.output_projection.weight is backbone.model.shared.weight
    for number in range(2):
        backbone.freeze_below_output()
        with torch.no_grad():
            backbone.output_projection.weight.add_(0.01)
        backbone.save(tmp_path / str(number))
        again = load_model(str(tmp_path / str(number)), device="cpu")
        torch.testing.assert_close(logits_of(again), logits_of(backbone.eval()), rtol=0, atol=0)
        assert torch.equal(again.model.shared.weight, backbone.model.shared.weight)
        backbone = again


def test_frozen_layers_run_without_graph_and_dropout_and_the_last_block_with_both(tiny_folder_of: FolderOf) -> None:
    config = BackboneConfig(str(tiny_folder_of("m2m100")), src_lang="de", tgt_lang="en")
    module = TranslationModule(config, SCHEDULE, trainable="last_block")
    blocks = module.backbone.model.model.decoder.layers
    heard: list[Tensor] = []
    blocks[-1].register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    blocks[-1].fc1.register_forward_pre_hook(lambda _, inputs: heard.append(inputs[0]))
    module.eval()
    module.train()  # what Lightning does around a validation
    keys = [module.states(batch_of(module.backbone))[0] for _ in range(2)]
    assert not any(states.requires_grad for states in heard) and keys[0].requires_grad
    assert torch.equal(heard[0], heard[2]), "input of the last block"
    assert not torch.equal(keys[0], keys[1])
    module.eval()
    assert torch.equal(module.states(batch_of(module.backbone))[0], module.states(batch_of(module.backbone))[0])


def test_adapters_train_fewer_weights_than_the_layers_that_they_are_on(tiny_folder_of: FolderOf) -> None:
    pytest.importorskip("peft")

    def trained(trainable: Any) -> int:
        config = BackboneConfig(str(tiny_folder_of("marian")))
        module = TranslationModule(config, SCHEDULE, trainable=trainable, adapter_rank=2)
        return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)

    width, inner, vocabulary = 24, 32, load_model(str(tiny_folder_of("marian")), device="cpu").vocabulary_size
    assert trained("last_block") == 2 * width * inner + inner + width + 2 * width + vocabulary * width
    assert trained("adapters") == 2 * (2 * (width + inner) + width + vocabulary) + 2 * width


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": -1.0}, "gamma is -1.0, expected 0 or more and finite"),
        ({"gamma": math.nan}, "gamma is nan, expected 0 or more and finite"),
        ({"trainable": "head"}, "trainable is 'head', expected one of all, last_block, adapters"),
        ({"adapter_rank": 0}, "adapter_rank is 0, expected 1 or more"),
        ({"label_smoothing": 1.0}, "label_smoothing is 1.0, expected 0 or more and less than 1"),
    ],
)
def test_wrong_options_are_named(marian_folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TranslationModule(BackboneConfig(str(marian_folder)), SCHEDULE, **options)


def test_missing_peft_says_how_to_install_it(marian_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="adapters need PEFT; install it with `pip install peft`"):
        TranslationModule(BackboneConfig(str(marian_folder)), SCHEDULE, trainable="adapters")


# ---- the loss


def test_losses_and_their_gradients_are_those_computed_by_hand(
    still_marian: Path, data: list[str], tmp_path: Path
) -> None:
    gamma, smoothing = 2.5, 0.1
    options = (
        "--model.trainable=last_block",
        "--model.dispersion=MeanResultantLength",
        f"--model.gamma={gamma}",
        "--data.max_tokens=10000",
    )
    first = fit(tmp_path, still_marian, data, *options, steps=1)[0]
    model = AutoModelForSeq2SeqLM.from_pretrained(still_marian).eval()
    backbone = load_model(str(still_marian), device="cpu")
    batch = backbone.batch([pair.src for pair in PAIRS[:40]], [pair.tgt for pair in PAIRS[:40]])
    assert batch.labels is not None
    with torch.inference_mode():
        output = model(
            input_ids=batch.input_ids,
            attention_mask=batch.attention_mask,
            labels=batch.labels,
            output_hidden_states=True,
        )
    mask = batch.target_mask
    logits, labels = output.logits[mask].double().numpy(), batch.labels[mask].numpy()
    states = output.decoder_hidden_states[-1][mask].double().numpy()
    n, vocabulary = logits.shape
    probabilities = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))
    wanted = np.full((n, vocabulary), smoothing / vocabulary)
    wanted[np.arange(n), labels] += 1 - smoothing
    translation = -(wanted * np.log(probabilities)).sum() / n
    translation_gradient = (probabilities - wanted) @ model.lm_head.weight.detach().double().numpy() / n
    norms = np.linalg.norm(states, axis=1, keepdims=True)
    unit = states / norms
    mean = unit.mean(axis=0)
    pull = mean / np.linalg.norm(mean)
    dispersion_gradient = (pull - unit * (unit @ pull)[:, None]) / (n * norms)
    assert first["train/translation_loss"] == pytest.approx(translation, rel=1e-4)
    assert first["train/dispersion"] == pytest.approx(np.linalg.norm(mean), rel=1e-4)
    assert first["train/loss"] == pytest.approx(translation + gamma * np.linalg.norm(mean), rel=1e-4)
    assert first["train/translation_gradient"] == pytest.approx(np.linalg.norm(translation_gradient), rel=1e-3)
    assert first["train/dispersion_gradient"] == pytest.approx(np.linalg.norm(dispersion_gradient), rel=1e-3)


def test_gamma_0_trains_the_same_weights_as_no_dispersion_and_logs_it(
    still_marian: Path, data: list[str], tmp_path: Path
) -> None:
    plain = fit(tmp_path / "plain", still_marian, data)
    zero = fit(tmp_path / "zero", still_marian, data, "--model.dispersion=MeanResultantLength", "--model.gamma=0")
    assert column(zero, "train/loss") == column(plain, "train/loss") == column(zero, "train/translation_loss")
    assert len(column(zero, "train/dispersion")) == 4 and not column(plain, "train/dispersion")
    weights = [
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("plain", "zero")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_training_with_dispersion_spreads_keys_more_than_without(
    still_marian: Path, data: list[str], tmp_path: Path
) -> None:
    options = ["--model.trainable=last_block", "--model.dispersion=SlicedDispersion", "--model.dispersion.circles=4"]
    for gamma in (0, 10):
        fit(tmp_path / str(gamma), still_marian, data, *options, f"--model.gamma={gamma}", steps=30)
    lengths = []
    for gamma in (0, 10):
        backbone = load_model(str(tmp_path / str(gamma) / "model"), device="cpu")
        batch = batch_of(backbone)
        with torch.inference_mode():
            keys = backbone.keys(batch)[batch.target_mask].numpy()
        lengths.append(np.linalg.norm((keys / np.linalg.norm(keys, axis=1, keepdims=True)).mean(axis=0)))
    assert lengths[1] < 0.7 * lengths[0]


# ---- precision, accumulation, processes


def test_mixed_precision_trains_float32_weights_to_nearly_the_same_loss(
    still_marian: Path, data: list[str], tmp_path: Path
) -> None:
    options = ("--model.trainable=last_block", "--model.dispersion=MeanResultantLength")
    full = fit(tmp_path / "full", still_marian, data, *options)
    mixed = fit(tmp_path / "mixed", still_marian, data, *options, "--trainer.precision=bf16-mixed")
    for name in ("train/loss", "train/dispersion", "val/loss", "train/translation_gradient"):
        assert column(mixed, name) == pytest.approx(column(full, name), rel=0.05)
        assert column(mixed, name) != column(full, name)
    weights = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "mixed" / "model").state_dict()
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}


@pytest.fixture(scope="module")
def even_data(still_marian: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int]:
    """Options for eight pairs with as many tokens each, so that batches of four and of eight weigh all the same."""
    folder = tmp_path_factory.mktemp("even")
    backbone = load_model(str(still_marian), device="cpu")
    alike: dict[tuple[int, int], list[Pair]] = {}
    for number in range(200):
        pair = Pair(f"{number % 9} {GERMAN[number % 7]}", f"{number % 5} {ENGLISH[number % 7]}")
        ids = backbone.tokenize([pair.src], [pair.tgt])
        alike.setdefault((len(ids.src[0]), len(ids.tgt[0])), []).append(pair)
    lengths, pairs = max(alike.items(), key=lambda item: len(set(item[1])))
    pairs = sorted(set(pairs), key=str)[:8]
    assert len(pairs) == 8
    return data_options(folder, pairs, pairs), max(lengths)


def test_two_accumulated_batches_are_one_of_twice_the_size(
    still_marian: Path, even_data: tuple[list[str], int], tmp_path: Path
) -> None:
    data, length = even_data
    whole = fit(tmp_path / "whole", still_marian, data, f"--data.max_tokens={8 * length}")
    halves = ("--trainer.accumulate_grad_batches=2", f"--data.max_tokens={4 * length}")
    accumulated = fit(tmp_path / "halves", still_marian, data, *halves)
    assert column(accumulated, "val/loss")[-1] == pytest.approx(column(whole, "val/loss")[-1], rel=1e-3)
    assert max(column(accumulated, "step")) == max(column(whole, "step")) == 3


def health_of_both_halves(run: Path, validation: Path) -> tuple[float, float]:
    """Codes scanned and imbalance factor of FAISS's own index over the keys of a run's last model.

    The sample of two processes is drawn again by hand: each key has the priority that its process drew for it.
    """
    backbone = load_model(str(run / "model"), device="cpu")
    ids = backbone.tokenize(*zip(*((pair.src, pair.tgt) for pair in read_split(validation)), strict=True))
    lengths = [max(map(len, pair)) for pair in zip(ids.src, ids.tgt, strict=True)]
    batches = divisible_batches(token_budget_batches(lengths, 50), 2)
    keys, priorities = [], []
    for rank in range(2):
        generator = torch.Generator().manual_seed(1_000_003 + rank)
        for items in batches[rank::2]:
            batch = collate([ids.src[item] for item in items], [ids.tgt[item] for item in items], backbone.pad_id)
            with torch.inference_mode():
                found = backbone.keys(batch)[batch.target_mask]
            keys.append(found)
            priorities.append(torch.rand(len(found), generator=generator))
    sample = torch.cat(keys)[torch.cat(priorities).argsort()].numpy()
    held_out = len(sample) // 10
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(sample.shape[1]), sample.shape[1], 2)
    index.cp.seed, index.cp.min_points_per_centroid = 1, 1
    index.train(sample[held_out:])
    index.add(sample[held_out:])
    faiss.cvar.indexIVF_stats.reset()
    index.search(sample[:held_out], 1)
    return faiss.cvar.indexIVF_stats.ndis / held_out, index.invlists.imbalance_factor()


@pytest.mark.slow
def test_two_processes_train_as_one_with_batches_of_twice_the_size(
    still_marian: Path, even_data: tuple[list[str], int], tmp_path: Path
) -> None:
    data, length = even_data
    data = [*data, "--model.trainable=last_block"]
    whole = fit(tmp_path / "whole", still_marian, data, f"--data.max_tokens={8 * length}")
    script = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path; from training_runs import fit\n"
        "folder, model, *options = sys.argv[1:]; fit(Path(folder), Path(model), options)"
    )
    (tmp_path / "fit.py").write_text(script)
    parallel = (
        *("--trainer.strategy=ddp", "--trainer.devices=2", f"--data.max_tokens={4 * length}"),
        *("--data.validation_max_tokens=50", "--trainer.callbacks+=lightning_knnmt.training.IndexHealth"),
        *("--trainer.callbacks.nlist=2", "--trainer.callbacks.nprobe=1", "--trainer.callbacks.max_keys=1000"),
    )
    subprocess.run(
        [sys.executable, str(tmp_path / "fit.py"), str(tmp_path / "two"), str(still_marian), *data, *parallel],
        check=True, timeout=300, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    rows = logged(tmp_path / "two")
    assert column(rows, "val/loss")[-1] == pytest.approx(column(whole, "val/loss")[-1], rel=1e-3)
    scanned, imbalance = health_of_both_halves(tmp_path / "two", Path(data[1].removeprefix("--data.validation=")))
    assert column(rows, "val/codes_scanned")[-1] == pytest.approx(scanned, rel=1e-4)
    assert column(rows, "val/imbalance_factor")[-1] == pytest.approx(imbalance, rel=1e-4)
    assert load_model(str(tmp_path / "two" / "model"), device="cpu").key_size == 24


# ---- checkpoints


@pytest.mark.parametrize("resumed_at", [6, 8], ids=["between epochs", "within an epoch"])
@pytest.mark.parametrize("trainable", ["all", "last_block", "adapters"])
def test_a_resumed_run_is_the_run_that_was_not_interrupted(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path, trainable: str, resumed_at: int
) -> None:
    if trainable == "adapters":
        pytest.importorskip("peft")
    options = [f"--model.trainable={trainable}", "--model.dispersion=SlicedDispersion"]
    model = tiny_folder_of("marian_scratch")
    whole = fit(tmp_path / "whole", model, data, *options, steps=14)
    assert [row["epoch"] for row in whole if "train/loss" in row] == [0] * 6 + [1] * 6 + [2] * 2
    resume = f"--ckpt_path={tmp_path}/whole/checkpoints/step={resumed_at}.ckpt"
    rest = fit(tmp_path / "rest", model, data, *options, resume, steps=14)
    for name in ("train/loss", "train/dispersion"):
        assert len(set(column(whole, name))) == 14
        assert column(rest, name) == column(whole, name)[resumed_at:]
    weights = [
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path / name / "model").state_dict() for name in ("whole", "rest")
    ]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_checkpoints_of_plain_training_made_before_there_was_dispersion_resume(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path
) -> None:
    model = tiny_folder_of("marian_scratch")
    fit(tmp_path / "whole", model, data, steps=2)
    path = tmp_path / "whole" / "checkpoints" / "step=1.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    plain = AutoModelForSeq2SeqLM.from_pretrained(model)
    assert list(checkpoint["state_dict"]) == [f"backbone.model.{name}" for name in plain.state_dict()]
    parameters = [weights for name, weights in plain.named_parameters() if "embed_positions" not in name]
    moments = checkpoint["optimizer_states"][0]["state"]
    assert sorted(moments) == list(range(1, len(parameters))), "the shared embedding has no part in an untied model"
    assert all(moments[number]["exp_avg"].shape == parameters[number].shape for number in moments)
    options = checkpoint["hyper_parameters"]
    for name in ("trainable", "adapter_rank", "dispersion", "gamma"):
        del options[name]
    options |= {name: options["backbone"][name] for name in ("model", "src_lang", "tgt_lang")}
    del options["backbone"]
    torch.save(checkpoint, path)
    rows = fit(tmp_path / "rest", model, data, f"--ckpt_path={path}", steps=3)
    assert column(rows, "step")[0] == 1 and len(column(rows, "train/loss")) == 2
