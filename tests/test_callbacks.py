"""Callbacks: index health is that of the held-out keys, in time for checkpoints, and drawn for every logger."""

import re
from pathlib import Path
from typing import Any

import faiss
import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread
from numpy.typing import NDArray
from sklearn.metrics import homogeneity_score
from tiny_stores import corpus_pairs
from transformers import AutoModelForSeq2SeqLM

import lightning_knnmt.training.index_health as index_health
from lightning_knnmt.backbone.batch import Batch
from lightning_knnmt.backbone.config import BackboneConfig
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.data.splits import write_splits
from lightning_knnmt.training import ExportBackbone, IndexHealth, Schedule, TranslationModule
from lightning_knnmt.training.datamodule import TranslationDataModule
from lightning_knnmt.training.pictures import list_size_histogram

pytestmark = pytest.mark.filterwarnings("ignore:Found .* in eval mode", "ignore:Checkpoint directory .* not empty")
PAIRS = corpus_pairs(60)
NLIST = 6


@pytest.fixture
def data(tmp_path: Path) -> TranslationDataModule:
    write_splits(tmp_path / "data", {"train": PAIRS[:30], "validation": PAIRS[30:], "test": []}, {})
    files = (tmp_path / "data" / f"{name}.jsonl" for name in ("train", "validation"))
    return TranslationDataModule(*files, max_tokens=100, validation_max_tokens=60)


@pytest.fixture
def module(marian_folder: Path) -> TranslationModule:
    config = BackboneConfig(str(marian_folder))
    return TranslationModule(config, Schedule(lr=1e-2, warmup_steps=1), trainable="last_block")


def trainer(folder: Path, callbacks: list[L.Callback], logger: Any = False, **options: Any) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        callbacks=callbacks,
        logger=logger,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **options,
    )


def held_out(backbone: KeyedModel) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Keys and tokens of the validation split, sentence by sentence."""
    keys, tokens = [], []
    backbone.eval()
    with torch.inference_mode():
        for pair in PAIRS[30:]:
            batch = backbone.batch([pair.src], [pair.tgt])
            keys.append(backbone.keys(batch)[0])
            tokens.append(batch.labels[0])
    return torch.cat(keys).numpy(), torch.cat(tokens).numpy()


@pytest.fixture
def indexed(monkeypatch: pytest.MonkeyPatch) -> list[NDArray[np.float32]]:
    """The keys of every index that IndexHealth makes; their lists do not depend on the order of the keys."""
    seen: list[NDArray[np.float32]] = []

    def fixed(keys: NDArray[np.float32], nlist: int, *_: Any) -> NDArray[np.float32]:
        seen.append(keys)
        return np.random.default_rng(1).normal(size=(nlist, keys.shape[1])).astype(np.float32)

    monkeypatch.setattr(index_health, "metric_centroids", fixed)
    return seen


def rows_of(part: NDArray[np.float32], keys: NDArray[np.float32]) -> NDArray[np.int64]:
    """Which of the keys each is, alone or in a batch."""
    squares = ((part[:, None] - keys[None]) ** 2).sum(-1)
    assert squares.min(axis=1).max() < 1e-6, "each is a held-out key"
    return squares.argmin(axis=1)


def test_index_health_is_that_of_an_index_over_the_held_out_keys(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path, indexed: list[NDArray[np.float32]]
) -> None:
    run = trainer(tmp_path, [IndexHealth(NLIST, nprobe=2, queries=20)])
    (values,) = run.validate(module, data, verbose=False)
    every, every_token = held_out(module.backbone)
    keys, tokens = indexed[0], every_token[rows_of(indexed[0], every)]
    assert len(every) - len(keys) == 20
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(keys.shape[1]), keys.shape[1], NLIST)
    index.quantizer.add(np.random.default_rng(1).normal(size=(NLIST, keys.shape[1])).astype(np.float32))
    index.is_trained = True
    index.add(keys)
    lists = index.quantizer.search(keys, 1)[1][:, 0]
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    length = np.linalg.norm(unit.mean(axis=0))
    assert values["val/imbalance_factor"] == pytest.approx(index.invlists.imbalance_factor()) != 1
    assert values["val/homogeneity"] == pytest.approx(homogeneity_score(tokens, lists))
    assert values["val/mean_resultant_length"] == pytest.approx(length, rel=1e-4)
    assert values["val/spherical_variance"] == pytest.approx(1 - length, rel=1e-4)


def test_scanned_codes_are_those_that_faiss_scans_for_keys_that_are_not_in_the_index(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    measure = index_health.index_health
    monkeypatch.setattr(index_health, "index_health", lambda *given, **_: (calls.append(given), measure(*given))[1])
    run = trainer(tmp_path, [IndexHealth(NLIST, nprobe=2, queries=20)])
    (values,) = run.validate(module, data, verbose=False)
    keys, _, queries, centroids, _ = (part.numpy() if isinstance(part, torch.Tensor) else part for part in calls[0])
    every, _ = held_out(module.backbone)
    assert len(queries) == 20
    both = np.concatenate([keys, queries])
    np.testing.assert_allclose(np.sort(both, axis=0), np.sort(every, axis=0), atol=1e-4, err_msg="each key once")
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(keys.shape[1]), keys.shape[1], NLIST)
    index.quantizer.add(centroids)
    index.is_trained = True
    index.add(keys)
    index.nprobe = 2
    faiss.cvar.indexIVF_stats.reset()
    index.search(queries, 1)
    assert values["val/codes_scanned"] == pytest.approx(faiss.cvar.indexIVF_stats.ndis / 20)
    formula = 2 * len(keys) * values["val/imbalance_factor"] / NLIST
    assert values["val/codes_scanned"] != pytest.approx(formula, rel=1e-3), "measured, not derived"


def test_a_sample_of_held_out_keys_is_uniform_over_sentence_lengths(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path, indexed: list[NDArray[np.float32]]
) -> None:
    for _ in range(2):
        trainer(tmp_path, [IndexHealth(max_keys=100, queries=10)]).validate(module, data, verbose=False)
    keys, _ = held_out(module.backbone)
    assert len(indexed[0]) == 100 < len(keys)
    assert np.array_equal(indexed[0], indexed[1])
    assert abs(rows_of(indexed[0], keys).mean() - len(keys) / 2) < 0.15 * len(keys)


def test_checkpoints_early_stops_and_exports_see_the_health_of_their_own_epoch(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path
) -> None:
    health = "val/imbalance_factor"
    best = ModelCheckpoint(
        tmp_path / "best",
        monitor=health,
        save_top_k=-1,
        filename="{step}-{" + health + ":.8f}",
        auto_insert_metric_name=False,
    )
    stop = EarlyStopping(health, mode="max", patience=0)
    export = ExportBackbone(tmp_path / "model", monitor=health)
    seen: list[tuple[float, float]] = []

    class Witness(L.Callback):
        def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if not trainer.sanity_checking:
                seen.append((float(trainer.callback_metrics[health]), export.best))

    run = trainer(tmp_path, [best, stop, export, Witness(), IndexHealth(NLIST)], max_epochs=4)
    run.fit(module, data)
    assert len({value for value, _ in seen}) == len(seen) == run.current_epoch
    assert [lowest for _, lowest in seen] == np.minimum.accumulate([value for value, _ in seen]).tolist()
    assert float(best.best_model_score) == min(value for value, _ in seen)
    assert (stop.stopped_epoch > 0) == (len(seen) < 4)
    assert float(stop.best_score) == max(value for value, _ in seen)


def test_the_last_weights_are_validated_and_exported_in_the_middle_of_an_epoch(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path
) -> None:
    run = trainer(tmp_path, [ExportBackbone(tmp_path / "model", monitor=None)], max_steps=5)
    run.fit(module, data)
    assert run.fit_loop.epoch_loop.batch_progress.current.completed not in (0, run.num_training_batches)
    exported = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "model").state_dict()
    trained = module.backbone.model.state_dict()
    assert all(torch.equal(exported[name], trained[name]) for name in exported)


def test_only_the_best_weights_are_exported_and_a_resumed_run_knows_them(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path
) -> None:
    export = ExportBackbone(tmp_path / "model", monitor="val/loss")
    export.load_state_dict({"best": 0.0})
    trainer(tmp_path, [export], max_steps=2).fit(module, data)
    assert not (tmp_path / "model").exists() and export.state_dict() == {"best": 0.0}
    export.load_state_dict({"best": 1e9})
    trainer(tmp_path, [export], max_steps=2).fit(module, data)
    assert (tmp_path / "model" / "model.safetensors").exists() and 0 < export.state_dict()["best"] < 1e9


def loggers(folder: Path) -> list[Any]:
    return [
        CSVLogger(folder / "csv"),
        TensorBoardLogger(folder / "tensorboard"),
        WandbLogger(save_dir=folder, offline=True),
    ]


def test_every_logger_gets_the_picture_of_list_sizes(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_MODE", "offline")
    csv, board, wandb_logger = loggers(tmp_path)
    run = trainer(tmp_path, [IndexHealth(NLIST)], [csv, board, wandb_logger], max_steps=4, val_check_interval=2)
    run.fit(module, data)
    wandb_logger.experiment.finish()
    pictures = sorted(Path(csv.log_dir).glob("*.png"))
    assert [path.name for path in pictures] == ["val_list_sizes_0000002.png", "val_list_sizes_0000004.png"]
    assert all(imread(path)[..., :3].std() > 0.05 for path in pictures), "not blank"
    events = EventAccumulator(board.log_dir, size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("val/list_sizes")] == [2, 4]
    assert "val/imbalance_factor" in events.Tags()["scalars"]
    (offline,) = (tmp_path / "wandb").glob("offline-run-*")
    assert len(list(offline.rglob("list_sizes*.png"))) == 2


def test_the_histogram_counts_every_list() -> None:
    for sizes in (np.random.default_rng(3).geometric(0.02, 64), np.array([0, 1, 4000, 2, 0]), np.array([7, 7, 7])):
        (axes,) = list_size_histogram(torch.from_numpy(sizes), 7).axes
        assert sum(bar.get_height() for bar in axes.patches) == (sizes > 0).sum()
        assert f"imbalance factor {len(sizes) * (sizes**2).sum() / sizes.sum() ** 2:.2f}" in axes.get_title()
        labels = [text.get_text() for text in axes.get_legend().get_texts()]
        assert f"{len(sizes)} lists, {(sizes == 0).sum()} of them empty" in labels


def test_the_axes_of_the_histogram_have_plain_numbers() -> None:
    figure = list_size_histogram(torch.tensor([3, 0, 40, 4000, 17]), 7)
    figure.canvas.draw()
    (axes,) = figure.axes
    shown = [text.get_text() for axis in (axes.xaxis, axes.yaxis) for text in axis.get_ticklabels() if text.get_text()]
    assert len(shown) > 6 and all(re.fullmatch(r"[\d,]+", text) for text in shown), shown
    assert all(bar.get_height() > 0.02 * axes.get_ylim()[1] for bar in axes.patches if bar.get_height())


def test_nothing_is_measured_in_the_sanity_check(
    module: TranslationModule, data: TranslationDataModule, tmp_path: Path, indexed: list[NDArray[np.float32]]
) -> None:
    trainer(tmp_path, [IndexHealth(NLIST)], max_steps=2, limit_val_batches=1, num_sanity_val_steps=1).fit(module, data)
    assert indexed == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nlist": 0}, "nlist is 0, expected 1 or more"),
        ({"max_keys": 0}, "max_keys is 0, expected 1 or more"),
        ({"nprobe": -1}, "nprobe is -1, expected 1 or more"),
        ({"queries": 0}, "queries is 0, expected 1 or more"),
        ({"nlist": 64, "max_keys": 50}, "nlist is 64, expected at most max_keys=50"),
    ],
)
def test_wrong_options_are_named(options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IndexHealth(**options)


def test_modules_that_do_not_give_their_keys_are_told_so(
    marian_folder: Path, data: TranslationDataModule, tmp_path: Path
) -> None:
    class Silent(TranslationModule):
        def validation_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
            super().validation_step(batch, batch_idx)

    module = Silent(BackboneConfig(str(marian_folder)), Schedule(lr=1e-2, warmup_steps=1))
    with pytest.raises(ValueError, match="IndexHealth needs the keys that the validation_step of TranslationModule"):
        trainer(tmp_path, [IndexHealth(NLIST)]).validate(module, data, verbose=False)
