"""The notebook runs top to bottom, and what it draws agrees with brute force."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stores import clumpy_keys, write_store

from lightning_knnmt.building.index import build_index
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.evaluation.key_plots import direction_figure, in_the_plane, metric_figure, sizes_by_metric
from lightning_knnmt.evaluation.plots import (
    StoreSample,
    angle_figure,
    codes_scanned,
    list_size_figure,
    sample_store,
    search_cost_figure,
)
from lightning_knnmt.index.balance import imbalance_factor
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.index.opening import open_index

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "cluster_sizes.ipynb"
DEMO = [ROOT / "runs" / "demo" / name / "index.json" for name in ("store", "dispersed/store")]
FACTORIES = {
    "plain": "IVF16,Flat",
    "refined": "IVF16,PQ4x4fs,Refine(SQfp16)",
    "rotated": "OPQ4,IVF16,PQ4x4fs",
    "rotated_refined": "OPQ4,IVF16,PQ4x4fs,Refine(SQfp16)",
    "flat": "Flat",
}


@pytest.fixture(scope="module")
def clumped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Datastore]:
    keys, values = clumpy_keys(1500, 16)
    with write_store(tmp_path_factory.mktemp("clumped") / "store", keys, values, [1000, 500]) as store:
        for name, factory in FACTORIES.items():
            build_index(store, IndexConfig(factory, name=name))
        yield store


@pytest.fixture(scope="module")
def even_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    keys = np.random.default_rng(1).normal(size=(1000, 16)).astype(np.float16)
    folder = tmp_path_factory.mktemp("even") / "store"
    with write_store(folder, keys, np.arange(1000, dtype=np.int32) % 7) as store:
        build_index(store, IndexConfig("IVF8,Flat"))
    return folder


@pytest.fixture(scope="module")
def samples(clumped: Datastore, even_folder: Path) -> dict[str, StoreSample]:
    return {"clumped": sample_store(clumped.folder, "plain"), "even": sample_store(even_folder)}


@pytest.mark.slow
def test_the_notebook_runs_on_two_stores(
    clumped: Datastore, even_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    stores = {"γ = 0": [str(clumped.folder), "rotated"], "γ = 1": [str(even_folder), "index"]}
    check_pictures(run_notebook(stores, monkeypatch, tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not all(path.exists() for path in DEMO), reason="the demo's stores are not built; run `make demo`")
def test_the_notebook_runs_on_the_demos_stores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    check_pictures(run_notebook(None, monkeypatch, tmp_path))


def run_notebook(stores: dict | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[bytes]:
    """The pictures that the notebook shows, one of each cell that has one."""
    import nbformat
    from nbclient import NotebookClient

    if stores is None:
        monkeypatch.delenv("KNNMT_STORES", raising=False)
    else:
        monkeypatch.setenv("KNNMT_STORES", json.dumps(stores))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    for output in outputs:
        assert output.output_type != "stream", output.text
    return [base64.b64decode(output.data["image/png"]) for output in outputs if "image/png" in output.get("data", {})]


def check_pictures(pictures: list[bytes]) -> None:
    from io import BytesIO

    from matplotlib.image import imread

    assert len(pictures) == 5
    for picture in pictures:
        pixels = imread(BytesIO(picture), format="png")
        assert pixels.shape[0] > 200
        assert pixels[..., :3].std() > 0.05, "an empty picture"


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


@pytest.mark.parametrize("name", ["plain", "refined", "rotated", "rotated_refined"])
def test_all_keys_as_queries_scan_what_the_imbalance_factor_says_at_nprobe_1_and_everything_at_nlist(
    clumped: Datastore, name: str
):
    sample = sample_store(clumped.folder, name, size=len(clumped), nprobe=99)
    assert sample.probed[:, 0].tolist() == open_index(clumped, name).list_of_entries().tolist()
    scanned = codes_scanned(sample.sizes, sample.probed)
    assert scanned.shape == (16,)
    assert scanned[0] == pytest.approx(len(clumped) / 16 * sample.imbalance_factor)
    assert scanned[-1] == len(clumped)


def test_probed_lists_are_those_whose_entries_the_search_finds(clumped: Datastore):
    index = open_index(clumped, "rotated")
    queries = np.random.default_rng(3).normal(size=(20, 16)).astype(np.float32)
    probed = index.probed_lists(queries, 3)
    _, ids = index.search(queries, len(clumped), nprobe=3)
    list_of_entries = index.list_of_entries()
    for found, lists in zip(ids, probed, strict=True):
        assert set(list_of_entries[found[found >= 0]]) == {number for number in lists if index.list_sizes()[number]}


def test_an_index_without_lists_is_refused(clumped: Datastore):
    with pytest.raises(ValueError, match=r"'flat' of .* has no inverted lists, expected one such as IVF1024"):
        sample_store(clumped.folder, "flat")


def test_the_lorenz_curve_begins_with_the_smallest_lists_and_bends_with_imbalance(samples: dict[str, StoreSample]):
    axes = list_size_figure(samples).axes[2]
    areas = {}
    for label, line in zip(samples, axes.lines, strict=False):
        share, entries = line.get_data()
        assert (entries[0], entries[-1]) == (0, 100)
        assert entries[1] == pytest.approx(100 * samples[label].sizes.min() / samples[label].sizes.sum())
        assert (np.diff(entries, 2) >= -1e-9).all()  # convex
        areas[label] = np.trapezoid(entries, share)
    assert areas["clumped"] < areas["even"] < 5000


def test_every_list_is_in_the_histogram_or_named_as_empty():
    sizes = np.array([0, 1, 1, 9])
    axes = list_size_figure({"a": StoreSample(sizes, np.eye(2, dtype=np.float32), np.zeros((2, 1), np.int64))}).axes[1]
    (patch,) = axes.patches
    assert patch.get_data().values.sum() == pytest.approx(75)
    assert axes.get_legend().get_texts()[0].get_text() == "a: 4 lists, 25% empty"


def test_angle_shares_are_those_of_brute_force(samples: dict[str, StoreSample]):
    figure = angle_figure(samples)
    sample = samples["clumped"]
    unit = sample.keys / np.linalg.norm(sample.keys, axis=1, keepdims=True)
    pairs = np.rad2deg(np.arccos(np.clip(unit @ unit.T, -1, 1)))[np.triu_indices(len(unit), 1)]
    shares = figure.axes[0].patches[0].get_data()
    middles = (shares.edges[1:] + shares.edges[:-1]) / 2
    assert (shares.values * np.diff(shares.edges)).sum() == pytest.approx(100)
    assert (shares.values * np.diff(shares.edges) * middles).sum() / 100 == pytest.approx(pairs.mean(), abs=3)
    length = np.linalg.norm(unit.mean(axis=0))
    label = figure.axes[1].get_legend().get_texts()[0].get_text()
    assert label == f"clumped: mean resultant length {length:.2f}"


def test_a_common_direction_is_seen_by_inner_products_with_centroids_of_any_norm_only():
    rng = np.random.default_rng(1)
    keys = (rng.normal(size=(3000, 8)) + 6 * np.eye(8)[0]).astype(np.float32)
    factors = {
        way: imbalance_factor(torch.from_numpy(sizes))
        for way, sizes in sizes_by_metric(keys).items()
        if sizes.sum() == 3000
    }
    assert factors["inner products, any centroids"] > 2 * factors["squared distances"]
    assert factors["inner products, unit centroids"] < 2 * factors["squared distances"]


def test_directions_are_drawn_along_their_mean_and_the_widest_axis_besides():
    rng = np.random.default_rng(1)
    raw = rng.normal(size=(500, 6)) * [1, 1, 4, 1, 1, 1] + [0, 5, 0, 0, 0, 0]
    unit = torch.from_numpy(raw / np.linalg.norm(raw, axis=1, keepdims=True))
    along = in_the_plane(unit)
    assert float(along[:, 0].mean()) == pytest.approx(float(unit.mean(0).norm()))
    assert abs(np.corrcoef(along[:, 1].numpy(), raw[:, 2])[0, 1]) > 0.9
    assert (along.norm(dim=1) <= 1 + 1e-9).all()


def test_pictures_of_keys_name_the_store_and_their_axes(samples: dict[str, StoreSample]):
    for draw in (metric_figure, direction_figure):
        panels = [axes for axes in draw(samples).axes if axes.get_title()]
        assert [axes.get_title().split(":")[0] for axes in panels] == list(samples)
        assert all(axes.get_xlabel() and axes.get_legend() is not None for axes in panels)
        assert panels[0].get_ylabel()


def test_pictures_have_labels_units_and_a_legend(samples: dict[str, StoreSample]):
    for draw in (list_size_figure, angle_figure, search_cost_figure):
        for axes in draw(samples).axes:
            assert axes.get_xlabel() and axes.get_ylabel() and axes.get_title()
            assert len(axes.get_legend().get_texts()) >= 2


def test_the_line_of_search_cost_follows_the_formula_and_stops_at_all_entries(samples: dict[str, StoreSample]):
    sample = samples["clumped"]
    line = search_cost_figure(samples).axes[0].lines[0]
    factor = imbalance_factor(torch.from_numpy(sample.sizes))
    assert line.get_xdata().tolist() == [1, 2, 4, 8, 16]
    expected = [min(1500, nprobe * 1500 / 16 * factor) for nprobe in (1, 2, 4, 8, 16)]
    assert line.get_ydata().tolist() == pytest.approx(expected)
