"""train.py: a run keeps its folder and its options, says what would ruin a model, and ends with a line at an error."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from training_runs import PAIRS, ROOT, column, data_options, fit

import train
from lightning_knnmt.backbone.config import BackboneConfig, load_model
from lightning_knnmt.training import Schedule, TranslationModule
from lightning_knnmt.training.command_line import dispersion_losses

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI.s args parameter", "ignore:Found .* in eval mode", "ignore:.*tied layer", "ignore:The dirpath"
)
FolderOf = Callable[[str], Path]
PRETIX = ROOT / "configs" / "dispersion" / "pretix.yaml"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Options for a small corpus of several batches."""
    return data_options(tmp_path_factory.mktemp("data"), PAIRS[:40], PAIRS[40:])


def refusal(capsys: pytest.CaptureFixture[str], call: Callable[[], object]) -> str:
    """The one line with which a call ends, with status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call()
    assert exit.value.code == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and error.rstrip().endswith(lines[0]) and "Traceback" not in error, error
    return lines[0]


# ---- the model


def test_a_model_trains_with_the_task_that_is_put_before_its_sources(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path
) -> None:
    prefix = "Der Text ist: "
    rows = fit(tmp_path / "task", tiny_folder_of("t5"), data, f"--model.backbone.src_prefix={prefix}", steps=1)
    plain = fit(tmp_path / "plain", tiny_folder_of("t5"), data, steps=1)
    losses = []
    for name, before in (("task", prefix), ("plain", "")):
        trained = load_model(str(tmp_path / name / "model"), device="cpu")
        batch = trained.batch([before + pair.src for pair in PAIRS[40:]], [pair.tgt for pair in PAIRS[40:]])
        with torch.inference_mode():
            logits = trained.keys_and_logits(batch)[1]
        losses.append(
            float(torch.nn.functional.cross_entropy(logits[batch.target_mask], batch.labels[batch.target_mask]))
        )
    assert column(rows, "val/loss")[-1] == pytest.approx(losses[0], rel=1e-4)
    assert column(plain, "val/loss")[-1] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0] != pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"key_type": "ffn_input"}, "backbone.key_type is 'ffn_input', expected 'decoder_output'"),
        ({"device": "cuda"}, "backbone.device is 'cuda', expected 'auto': Lightning chooses the device"),
        ({"dtype": "bfloat16"}, "backbone.dtype is 'bfloat16', expected 'float32': Lightning chooses the precision"),
    ],
)
def test_options_of_a_model_that_are_not_for_training_are_refused(
    marian_folder: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        TranslationModule(BackboneConfig(str(marian_folder), **options), Schedule(1e-3, 1))  # type: ignore[arg-type]


def test_hyper_parameters_are_plain_values(marian_folder: Path) -> None:
    from lightning_knnmt.dispersion import SlicedDispersion

    module = TranslationModule(BackboneConfig(str(marian_folder)), Schedule(1e-3, 1), dispersion=SlicedDispersion(4))
    saved = dict(module.hparams)
    assert saved["backbone"]["model"] == str(marian_folder) and saved["backbone"]["key_type"] == "decoder_output"
    assert saved["schedule"] == {"lr": 1e-3, "warmup_steps": 1, "max_steps": None, "decay_steps": 0}
    assert saved["dispersion"]["init_args"] == {"circles": 4, "reduction": "mean"}
    assert (saved["trainable"], saved["gamma"], saved["label_smoothing"]) == ("all", 1.0, 0.1)


# ---- one run, one folder


def test_a_second_run_is_refused_the_folder_of_the_first_unless_it_is_to_take_its_place(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_folder_of("marian_scratch")
    fit(tmp_path, model, data, "--checkpoint.save_last=true", steps=3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    message = refusal(capsys, lambda: fit(tmp_path, model, data, steps=2))
    assert f"trainer.default_root_dir is {tmp_path}, which holds another run, expected a new folder" in message
    assert f"--ckpt_path {tmp_path}/checkpoints/last.ckpt" in message and "--overwrite true" in message
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}

    fit(tmp_path, model, data, "--overwrite=true", "--checkpoint.save_last=true", steps=2)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    assert torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 2


def test_a_run_is_resumed_in_its_own_folder_and_made_longer(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path
) -> None:
    model = tiny_folder_of("marian_scratch")
    fit(tmp_path, model, data, "--checkpoint.save_last=true", steps=2)
    last = tmp_path / "checkpoints" / "last.ckpt"
    fit(tmp_path, model, data, "--checkpoint.save_last=true", f"--ckpt_path={last}", steps=5)
    assert torch.load(last, weights_only=True)["global_step"] == 5


def test_nothing_is_written_but_the_table_without_save(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path
) -> None:
    fit(tmp_path, tiny_folder_of("marian_scratch"), data, "--save=false", steps=1)
    assert not (tmp_path / "model").exists() and not (tmp_path / "checkpoints").exists()


def test_validating_writes_no_model(tiny_folder_of: FolderOf, data: list[str], tmp_path: Path) -> None:
    model = tiny_folder_of("marian_scratch")
    schedule = ("--model.schedule.lr=0.01", "--model.schedule.warmup_steps=1")
    folder = (f"--trainer.default_root_dir={tmp_path}", "--trainer.accelerator=cpu")
    train.main(["validate", f"--model.backbone.model={model}", *schedule, *data, *folder])
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--model.gamma=3", "gamma is 3.0, expected 1.0 as in the run of the checkpoint"),
        ("--model.label_smoothing=0", "label_smoothing is 0.0, expected 0.1 as in the run of the checkpoint"),
        ("--model.schedule.warmup_steps=2", "schedule.warmup_steps is 2, expected 1 as in the run of the checkpoint"),
        ("--model.trainable=last_block", "trainable is 'last_block', expected 'all' as in the run of the checkpoint"),
        ("--model.backbone.src_prefix=a", "backbone.src_prefix is 'a', expected '' as in the run of the checkpoint"),
        ("--model.dispersion=KoLeo", "dispersion is {'class_path': 'lightning_knnmt.dispersion.losses.KoLeo'"),
    ],
)
def test_a_run_is_not_resumed_with_other_options(
    tiny_folder_of: FolderOf, data: list[str], tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str], option: str, message: str,
) -> None:  # fmt: skip
    folder, model = tmp_path_factory.getbasetemp() / "resumed", tiny_folder_of("marian_scratch")
    if not folder.exists():
        fit(folder, model, data, steps=1)
    resume = f"--ckpt_path={folder}/checkpoints/step=1.ckpt"
    assert message in refusal(capsys, lambda: fit(folder, model, data, option, resume, steps=2))


# ---- what would ruin a model


def test_label_smoothing_that_multiplies_the_loss_is_warned_of(
    marian_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = data_options(tmp_path / "data", PAIRS[:2], PAIRS[:2])
    plain = "--model.label_smoothing=0"
    with caplog.at_level(logging.WARNING, logger="lightning_knnmt"):
        rows = fit(tmp_path / "sure", marian_folder, data, plain, "--save=true", steps=60)
        sure = tmp_path / "sure" / "model"  # of its tokens, as a distilled model is
        fit(tmp_path / "on", sure, data, plain, steps=1)
        assert caplog.records == [] and column(rows, "val/loss")[-1] < 0.3
        fit(tmp_path / "smoothed", sure, data, "--model.label_smoothing=0.1", steps=2)
    (said,) = (record.getMessage() for record in caplog.records)
    assert said.startswith("label_smoothing is 0.1, with which the loss begins at ")
    assert said.endswith("set --model.label_smoothing 0")


def test_an_untrained_model_is_smoothed_without_a_warning(
    tiny_folder_of: FolderOf, data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="lightning_knnmt"):
        fit(tmp_path, tiny_folder_of("marian_scratch"), data, steps=1)
    assert [record for record in caplog.records if "label_smoothing" in record.getMessage()] == []


# ---- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.schedule.warmup_steps=-1"], "warmup_steps is -1, expected 0 or more"),
        (["--model.schedule.lr=1e30"], "lr is 1e+30, expected at most 1"),
        (["--model.schedule.lr=0"], "lr is 0.0, expected more than 0 and finite"),
        (["--trainer.max_steps=50"], "warmup_steps + decay_steps is 400, expected at most max_steps=50"),
        (["--model.backbone.model=no/such/model"], "no/such/model"),
        (["--model.gamma=much"], "model.gamma"),
        (["--model.no_such_option=1"], "no_such_option"),
        (["--data.train=nowhere.jsonl"], "nowhere.jsonl does not exist; write it with prepare_data.py"),
        (["--data.seed=-1"], "seed is -1, expected 0 or more"),
        (["--model.schedule.max_steps=7"], "model.schedule.max_steps follows from trainer.max_steps"),
        (["--model.trainable=adapters", "--model.adapter_rank=99999"], "adapter_rank is 99999, expected at most"),
        (["--trainer.max_steps=0"], "trainer.max_steps is 0, expected more"),
        (["--trainer.accumulate_grad_batches=0"], "trainer.accumulate_grad_batches is 0, expected 1 or more"),
        (["--trainer.gradient_clip_val=-1"], "trainer.gradient_clip_val is -1, expected 0 or more"),
        (["--trainer.limit_train_batches=-1"], "invalid value -1 for limit_train_batches"),
        (["--trainer.devices=-1"], "trainer.devices is -1: "),
        (["--trainer.callbacks.init_args.nlist=0"], "nlist is 0, expected 1 or more"),
        (
            ["--export.monitor=val/lost", "--trainer.val_check_interval=1", "--trainer.callbacks.init_args.nlist=4"],
            "export.monitor is 'val/lost', expected one of what is logged: ",
        ),
        (["--ckpt_path=picture.ckpt"], "Weights only load failed"),
    ],
)
def test_an_error_is_one_line(
    options: list[str], message: str, marian_folder: Path, data: list[str], tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    Path("picture.ckpt").write_text("no checkpoint")
    steps = ["--trainer.max_steps=500"]
    arguments = ["fit", f"--config={PRETIX}", f"--model.backbone.model={marian_folder}", *data, *steps, *options]
    assert message in refusal(capsys, lambda: train.main([*arguments, "--trainer.accelerator=cpu"]))


def test_an_unknown_dispersion_is_answered_with_those_that_there_are(capsys: pytest.CaptureFixture[str]) -> None:
    said = refusal(capsys, lambda: train.main(["fit", f"--config={PRETIX}", "--model.dispersion=Sliced"]))
    assert len(dispersion_losses()) == 9
    assert "Sliced" in said and "The dispersion losses are AxisAlignedSlicedDispersion, " in said
    assert all(name in said for name in dispersion_losses())


@pytest.mark.parametrize("command", ["test", "predict"])
def test_what_cannot_be_done_is_not_offered(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert "fit" in refusal(capsys, lambda: train.main([command, f"--config={PRETIX}"]))
    with pytest.raises(SystemExit) as exit:
        train.main(["--help"])
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "fit" in shown and "validate" in shown and "predict" not in shown


def test_the_optimizer_is_fused_only_where_gradients_can_be_clipped(marian_folder: Path) -> None:
    import lightning as L

    module = TranslationModule(BackboneConfig(str(marian_folder)), Schedule(1e-3, 1))
    assert module.configure_optimizers()["optimizer"].defaults["fused"]
    module.trainer = L.Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, enable_checkpointing=False)
    assert not module.configure_optimizers()["optimizer"].defaults["fused"]
