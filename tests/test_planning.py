"""Plans are arithmetic over measured rates: the arithmetic against figures by hand, the sizes against real builds."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_stores import corpus_pairs, write_corpus

from build_index import plan
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.plan import Plan, make_plan, to_text
from lightning_knnmt.building.plan.encoding import EncodingRates, sample_pairs
from lightning_knnmt.building.plan.indexing import IndexRates, kmeans_work, measure_index, training_rates
from lightning_knnmt.building.plan.prediction import Size, predict
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.datastore import Datastore
from lightning_knnmt.index.config import IndexConfig, Layout, choose_factory
from lightning_knnmt.storage.ranks import Processes

ENCODING = EncodingRates(
    pairs=50_000, entries=20, entries_error=0, read=1e-6, tokenize=1e-5, encode=1e-3, text_bytes=15, held_bytes=100,
    baseline=400e6, batches=100e6,
)  # fmt: skip
INDEX = IndexRates(
    sample=1e-7, kmeans=1e-10, codes=1.5, add=2e-5, write=1e-9, merge=2e-9, report=1e-7, empty_bytes=600_000,
    list_bytes=44, array_bytes=256,
)  # fmt: skip
SIZE = Size(
    entries=1_000_000, pairs=50_000, key_size=128, nlist=1024, train_points=65536,
    datastore=DatastoreConfig(Path("store"), CorpusFile(Path("corpus.jsonl")), shard_pairs=15_000),
    index=IndexConfig("IVF1024,PQ64x4fs,Refine(SQfp16)"),
)  # fmt: skip


def in_parts(entries: int, layout: Layout = "whole", machines: int = 1) -> Size:
    """The same in parts of at least so many entries."""
    index = replace(SIZE.index, part_entries=entries, layout=layout)
    return replace(SIZE, index=index, machines=machines)


def seconds(planned: Plan) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in planned.stages}


def test_times_are_those_computed_by_hand() -> None:
    planned = predict(SIZE, ENCODING, INDEX)
    assert seconds(planned) == pytest.approx(
        {
            "encode": 1.0 + 10 + 1000,
            "sample": 0.1,
            "train": 65536 * 1024 * 128 * 10 * 1e-10 + 1.5,
            "add": 20,
            "write": 0.3006,
            "report": 0.1,
        }
    )
    assert planned.whole.seconds == planned.whole.machine_seconds == pytest.approx(sum(seconds(planned).values()))


def test_disk_is_keys_of_two_bytes_values_of_four_texts_and_the_index() -> None:
    disk = predict(SIZE, ENCODING, INDEX).disk
    assert (disk.keys, disk.values, disk.texts) == (256e6, 4e6, 15e6)
    assert disk.index == 600_000 + 300e6
    assert disk.total == disk.keys + disk.values + disk.texts + disk.index
    assert disk.temporary == 0


def test_shards_and_parts_are_those_that_are_built() -> None:
    assert SIZE.shards == [300_000, 300_000, 300_000, 100_000]
    assert SIZE.parts == [1_000_000]
    assert in_parts(500_000).parts == [600_000, 400_000]
    assert replace(in_parts(500_000), nlist=None).parts == [1_000_000]


def test_machines_share_shards_and_parts_but_not_training() -> None:
    one, two = (predict(in_parts(1, machines=machines), ENCODING, INDEX) for machines in (1, 2))
    assert seconds(two)["train"] == seconds(one)["train"]
    assert seconds(two)["add"] == pytest.approx(0.6 * seconds(one)["add"])  # shards 0 and 2 of four
    assert seconds(two)["encode"] == pytest.approx(0.6 * (1000 + 10) + 1)
    parts, whole = 300e6 + 5 * 600_000, 300e6 + 600_000
    assert seconds(two)["write"] == pytest.approx(1e-9 * (0.6 * parts + whole))
    together = {stage.name: stage.machine_seconds for stage in two.stages}
    assert together["add"] == pytest.approx(seconds(one)["add"])
    assert together["write"] == pytest.approx(seconds(one)["write"])
    assert two.disk == one.disk
    assert "all machines" in to_text(two)


def test_an_index_in_parts_needs_the_memory_of_one_part_and_none_of_it_for_merging() -> None:
    merged = predict(in_parts(300_000), ENCODING, INDEX)
    shards = predict(in_parts(300_000, "shards"), ENCODING, INDEX)
    assert "merge" in seconds(merged)
    assert "merge" not in seconds(shards)
    assert merged.disk.temporary > 300e6
    assert shards.disk.temporary == 0
    assert shards.disk.index == 5 * 600_000 + 300e6
    assert shards.memory.index < 0.5 * merged.memory.index


def test_memory_is_the_most_of_what_no_two_stages_hold_at_once() -> None:
    memory = predict(SIZE, ENCODING, INDEX).memory
    assert memory.baseline == 400e6
    assert memory.encode == 100e6 + 100 * 600_000  # two shards of four
    assert memory.train == 4 * 128 * 65536
    assert memory.peak == 400e6 + memory.index
    assert memory.index == pytest.approx(600_000 + 1.5 * 44e6 + 256e6 + 6 * 128 * 65536)


def test_kmeans_uses_no_more_than_256_points_a_list() -> None:
    assert kmeans_work(10**6, 16, 128) == 256 * 16 * 16 * 128 * 10
    assert kmeans_work(1000, 16, 128) == 1000 * 16 * 128 * 10
    assert kmeans_work(1000, None, 128) == 0


@pytest.mark.parametrize(
    ("small", "large"), [((10, 3), (30, 5)), ((10, 5), (30, 3)), ((10, 0.1), (30, 3)), ((0, 2), (0, 2))]
)
def test_the_time_to_train_is_that_of_the_larger_probe_and_no_part_of_it_is_negative(
    small: tuple[float, float], large: tuple[float, float]
) -> None:
    rate, rest = training_rates(small, large)
    assert rate >= 0
    assert rest >= 0
    assert rate * large[0] + rest == pytest.approx(large[1])


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    corpus = write_corpus(tmp_path / "corpus.jsonl", corpus_pairs(600))
    return DatastoreConfig(tmp_path / "store", corpus, max_tokens=400, shard_pairs=150)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ4x4fs,Refine(SQfp16)", "IVF16_HNSW8,SQ8"])
@pytest.mark.filterwarnings("ignore")
def test_predicted_sizes_are_those_of_a_build(backbone: KeyedModel, config: DatastoreConfig, factory: str) -> None:
    index = IndexConfig(factory)
    planned = make_plan(backbone, config, index, sample_pairs=150)
    assert not config.folder.exists()
    assert [path.name for path in config.folder.parent.iterdir()] == ["corpus.jsonl"]
    manifest = build_datastore(backbone, config).manifest
    with Datastore(config.folder) as store:
        report = build_index(store, index)
    assert planned.size.pairs == manifest.pairs
    assert planned.size.entries == manifest.entries  # all lengths were counted
    assert len(planned.size.shards) == len(manifest.shards) == 4
    shards = sum((config.folder / shard.file).stat().st_size for shard in manifest.shards)
    disk = planned.disk
    assert disk.keys + disk.values + disk.texts == pytest.approx(shards, rel=0.05)
    assert disk.index == pytest.approx((config.folder / "index.faiss").stat().st_size, rel=0.05)
    assert (planned.size.nlist, planned.size.train_points) == (report.nlist, report.train_points)
    assert set(report.seconds) <= {stage.name for stage in planned.stages}
    assert all(stage.seconds >= 0 for stage in planned.stages)


def test_other_numbers_of_entries_are_extrapolated(backbone: KeyedModel, config: DatastoreConfig) -> None:
    few = make_plan(backbone, config, IndexConfig("Flat"), sample_pairs=50)
    many = make_plan(backbone, config, IndexConfig("Flat"), entries=1_000_000, sample_pairs=50)
    assert many.size.entries == 1_000_000
    assert many.size.pairs == pytest.approx(1_000_000 * few.size.pairs / few.size.entries, rel=0.1)
    assert many.disk.keys == 2 * 1_000_000 * backbone.key_size
    assert many.disk.index == pytest.approx(4 * 1_000_000 * backbone.key_size, rel=0.01)


def test_more_lists_than_are_measured_take_room(
    backbone: KeyedModel, config: DatastoreConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_datastore(backbone, config)
    index = IndexConfig("IVF256,PQ4x4fs,Refine(SQfp16)", train_points=1000, overwrite=True)
    with Datastore(config.folder) as store:
        monkeypatch.setattr("lightning_knnmt.building.plan.indexing.MEASURED_MULTIPLICATIONS", 1e6)
        rates = measure_index(store, index, len(store))
        build_index(store, index)
        predicted = rates.empty_bytes + len(store) * (rates.list_bytes + rates.array_bytes)
        assert predicted == pytest.approx((config.folder / "index.faiss").stat().st_size, rel=0.2)


def test_a_sample_is_uniform_and_counts_all_pairs(backbone: KeyedModel, config: DatastoreConfig) -> None:
    pairs, sample = sample_pairs(backbone, config.corpus, 100)
    assert pairs == 600
    numbers = [int(pair.src.split()[0]) for pair in sample]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 100
    assert 230 < sum(numbers) / 100 < 370
    assert len(sample_pairs(backbone, config.corpus, 1000)[1]) == 600


def test_the_options_of_a_build_print_a_plan(
    backbone: KeyedModel, config: DatastoreConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        planned = plan(backbone.config, config, IndexConfig(), Processes(), sample_pairs=50)
    assert capsys.readouterr().out == to_text(planned) + "\n"
    assert planned.size.index.factory == choose_factory(planned.size.entries, backbone.key_size)
    for word in ("entries", "shards", "disk", "peak memory", "encode", "add", "write", "in all", "uncertain"):
        assert word in to_text(planned)


def test_what_cannot_be_planned_is_refused(backbone: KeyedModel, config: DatastoreConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="entries is 0, expected 1 or more"):
        plan(backbone.config, config, entries=0)
    with pytest.raises(ValueError, match="machines is 0, expected 1 or more"):
        plan(backbone.config, config, machines=0)
    with pytest.raises(ValueError, match="sample_pairs is 0, expected 1 or more"):
        plan(backbone.config, config, sample_pairs=0)
    with pytest.raises(ValueError, match="factory is IMI2x4,Flat, expected one whose lists are written IVF"):
        plan(backbone.config, config, IndexConfig("IMI2x4,Flat"))
    with pytest.raises(ValueError, match="factory is 'Nonsense', which FAISS cannot make"):
        plan(backbone.config, config, IndexConfig("Nonsense"))
    with pytest.raises(ValueError, match="with 8192 lists, but there are only"):
        plan(backbone.config, config, IndexConfig("IVF8192,Flat"), sample_pairs=50)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no pairs, expected at least 1 to plan from"):
        plan(backbone.config, replace(config, corpus=replace(config.corpus, path=empty)))
