"""The held-out loss with neighbors, against numpy, and in a training."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from training_runs import PAIRS, column, data_options, fit

from lightning_knnmt.index.splitting import metric_centroids
from lightning_knnmt.metric import Metric
from lightning_knnmt.training import IndexHealth
from lightning_knnmt.training.index_health import nearest_lists
from lightning_knnmt.training.neighbor_loss import neighbor_loss

pytestmark = pytest.mark.filterwarnings(
    "ignore:LightningCLI.s args parameter", "ignore:Found .* in eval mode", "ignore:.*tied layer", "ignore:The dirpath"
)
RNG = np.random.default_rng(0)
CENTERS = RNG.normal(size=(12, 8))
VALUES, TOKENS = RNG.integers(0, 12, 400), RNG.integers(0, 12, 60)
KEYS = (CENTERS[VALUES] + 0.3 * RNG.normal(size=(400, 8))).astype(np.float32)
QUERIES = (CENTERS[TOKENS] + 0.3 * RNG.normal(size=(60, 8))).astype(np.float32)
LOG_PROBS = torch.from_numpy(np.log(RNG.uniform(0.02, 0.4, 60)))


def loss_of(metric: Metric, keys: np.ndarray = KEYS, log_probs: torch.Tensor = LOG_PROBS):
    arrays = (torch.from_numpy(each) for each in (keys, VALUES, QUERIES, TOKENS))
    return neighbor_loss(*arrays, log_probs, k=6, metric=metric)


@pytest.mark.parametrize("metric", ["l2", "ip", "cos"])
def test_the_loss_is_that_of_the_mixture_by_numpy(metric: Metric) -> None:
    found = loss_of(metric)
    queries, keys = QUERIES.astype(np.float64), KEYS.astype(np.float64)
    if metric == "cos":
        queries, keys = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (queries, keys))
    far = ((queries[:, None] - keys) ** 2).sum(2) if metric == "l2" else -queries @ keys.T
    losses = []
    for row in range(1, 60, 2):
        near = far[row].argsort(kind="stable")[:6]
        shares = np.exp(-(far[row, near] - far[row, near].min()) / found.temperature)
        knn = shares[VALUES[near] == TOKENS[row]].sum() / shares.sum()
        losses.append(-np.log(found.lambda_ * knn + (1 - found.lambda_) * np.exp(float(LOG_PROBS[row]))))
    assert float(found.value) == pytest.approx(np.mean(losses), rel=1e-4)


def test_a_ruined_model_cannot_win() -> None:
    good = float(loss_of("l2").value)
    even = RNG.normal(size=KEYS.shape).astype(np.float32)  # as balanced as can be, and of no use
    assert good < -float(LOG_PROBS[1::2].mean()) and good < float(loss_of("l2", keys=even).value) - 0.2
    assert float(loss_of("l2", log_probs=LOG_PROBS - 3).value) > good


@pytest.mark.parametrize(("metric", "unit"), [("l2", False), ("ip", True), ("ip", False), ("cos", True)])
def test_lists_are_those_that_an_index_of_the_metric_has(metric: Metric, unit: bool) -> None:
    from lightning_knnmt.metric import seen_by

    keys = torch.from_numpy(KEYS + 1)
    centroids = torch.from_numpy(metric_centroids(seen_by(keys, metric).numpy(), 8, metric, unit))
    assert torch.allclose(centroids.norm(dim=1), torch.ones(8), atol=1e-5) == unit
    lists = nearest_lists(keys, centroids, 3, metric=metric)
    seen = seen_by(keys, metric)
    expected = torch.cdist(seen, centroids) if metric == "l2" else -(seen @ centroids.T)
    assert (lists == expected.argsort(1)[:, :3]).float().mean() > 0.99


def test_checkpoints_and_exports_go_by_the_loss_with_neighbors(
    tiny_folder_of: Callable[[str], Path], tmp_path: Path
) -> None:
    options = [
        "--trainer.callbacks=lightning_knnmt.training.IndexHealth", "--trainer.callbacks.nlist=4",
        "--trainer.callbacks.knn_tokens=100", "--trainer.callbacks.metric=cos", "--export.monitor=val/knn_loss",
        "--checkpoint.monitor=val/knn_loss", "--trainer.val_check_interval=2", "--trainer.check_val_every_n_epoch=null",
        "--checkpoint.every_n_train_steps=null", "--checkpoint.save_top_k=1", "--checkpoint.save_last=true",
    ]  # fmt: skip
    data = data_options(tmp_path / "data", PAIRS[:40], PAIRS[40:])
    rows = fit(tmp_path / "run", tiny_folder_of("marian_scratch"), data, *options, steps=6)
    losses = column(rows, "val/knn_loss")
    assert len(losses) == 3 and all(0 < loss < 20 for loss in losses)
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    saved = next(state for name, state in last["callbacks"].items() if "ModelCheckpoint" in name)
    assert float(saved["best_model_score"]) == pytest.approx(min(losses), rel=1e-5)
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="knn_tokens is -1, expected 0 or more"):
        IndexHealth(knn_tokens=-1)
    with pytest.raises(ValueError, match="metric is 'dot', expected"):
        IndexHealth(metric="dot")  # type: ignore[arg-type]
