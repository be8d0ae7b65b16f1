"""Plans are arithmetic over measured rates: the arithmetic against figures by hand, the sizes against real builds."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_stores import corpus_pairs, write_corpus

from lightning_knnmt.backbone import Backbone
from lightning_knnmt.datastore import Datastore, DatastoreConfig, build_datastore
from lightning_knnmt.datastore.ranks import Processes
from lightning_knnmt.index import IndexConfig, build_index, choose_factory
from lightning_knnmt.planning import Plan, Size, make_plan, plan, predict
from lightning_knnmt.rates import EncodingRates, IndexRates, Line, kmeans_work, sample_corpus

ENCODING = EncodingRates(
    entries=20, entries_error=0, read=1e-5, tokenize=1e-4, encode=1e-3, text_bytes=300, held_bytes=2000,
    baseline=400e6, batches=100e6,
)  # fmt: skip
INDEX = IndexRates(
    sample=1e-7, point=1e-6, kmeans=Line(0.5, 1e-10), codes=Line(1.0, 1e-5), add=Line(2e-6, 1e-8), write=1e-9,
    merge=2e-9, report=1e-7, file_bytes=1000, list_bytes=600, entry_bytes=300,
)  # fmt: skip
SIZE = Size(
    entries=1_000_000, pairs=50_000, key_size=128, shard_entries=300_000, factory="IVF1024,PQ64x4fs,Refine(SQfp16)",
    nlist=1024, train_points=65536, contiguous_bytes=256,
)  # fmt: skip


def seconds(planned: Plan) -> dict[str, float]:
    return {stage.name: stage.seconds for stage in planned.stages}


def test_times_are_those_computed_by_hand() -> None:
    found = seconds(predict(SIZE, ENCODING, INDEX))
    work = 65536 * 1024 * 128 * 10
    index_bytes = 1000 + 600 * 1024 + 300 * 1_000_000
    assert found == pytest.approx(
        {
            "encode": 2 * 50_000 * 1e-5 + 50_000 * 1e-4 + 1_000_000 * 1e-3,
            "sample": 0.1 + 65536 * 1e-6,
            "train": 0.5 + work * 1e-10 + 1.0 + 65536 * 1e-5,
            "add": 1_000_000 * (2e-6 + 1024e-8),
            "write": index_bytes * 1e-9,
            "report": 0.1,
        }
    )


def test_disk_is_keys_of_two_bytes_values_of_four_texts_and_the_index() -> None:
    disk = predict(SIZE, ENCODING, INDEX).disk
    assert (disk.keys, disk.values, disk.texts) == (256e6, 4e6, 15e6)
    assert disk.index == 1000 + 600 * 1024 + 300e6
    assert disk.total == disk.keys + disk.values + disk.texts + disk.index
    assert disk.temporary == 0


def test_shards_and_parts_are_those_that_are_built() -> None:
    assert SIZE.shards == [300_000, 300_000, 300_000, 100_000]
    assert SIZE.parts == [1_000_000]
    assert replace(SIZE, part_entries=500_000).parts == [600_000, 400_000]
    assert replace(SIZE, part_entries=500_000, nlist=None).parts == [1_000_000]


def test_machines_share_shards_and_parts_but_not_training() -> None:
    one = predict(replace(SIZE, part_entries=1), ENCODING, INDEX)
    two = predict(replace(SIZE, part_entries=1, machines=2), ENCODING, INDEX)
    assert seconds(two)["train"] == seconds(one)["train"]
    assert seconds(two)["add"] == pytest.approx(0.6 * seconds(one)["add"])  # shards 0 and 2 of four
    encode = 0.6 * (1_000_000 * 1e-3 + 2 * 50_000 * 1e-4) + 2 * 50_000 * 1e-5
    assert seconds(two)["encode"] == pytest.approx(encode)
    add = next(stage for stage in two.stages if stage.name == "add")
    assert add.machine_seconds == pytest.approx(seconds(one)["add"])
    assert two.disk == one.disk
    assert "all machines" in two.to_text()


def test_an_index_in_parts_needs_the_memory_of_one_part_and_none_of_it_for_merging() -> None:
    merged = predict(replace(SIZE, part_entries=300_000), ENCODING, INDEX)
    shards = predict(replace(SIZE, part_entries=300_000, in_shards=True), ENCODING, INDEX)
    assert "merge" in seconds(merged)
    assert "merge" not in seconds(shards)
    assert merged.disk.temporary > 300e6
    assert shards.disk.temporary == 0
    assert shards.disk.index == 5 * (1000 + 600 * 1024) + 300e6
    assert shards.memory.index < 0.5 * merged.memory.index


def test_memory_is_the_most_of_what_no_two_stages_hold_at_once() -> None:
    memory = predict(SIZE, ENCODING, INDEX).memory
    assert memory.baseline == 400e6
    assert memory.encode == 100e6 + 2000 * 0.6 * 50_000  # two shards of four
    assert memory.sample == 4 * 128 * 65536 + 8e6 + 65536 * 256
    assert memory.peak == 400e6 + memory.index
    assert memory.index > 300e6


def test_a_graph_of_lists_costs_the_logarithm_of_their_number() -> None:
    def add(lists: int) -> float:
        factory = f"IVF{lists}_HNSW32,PQ64x4fs"
        return seconds(predict(replace(SIZE, factory=factory, nlist=lists), ENCODING, INDEX))["add"]

    assert add(1 << 16) - add(1 << 8) == pytest.approx(1_000_000 * 8 * 1e-8)


def test_kmeans_uses_no_more_than_256_points_a_list() -> None:
    assert kmeans_work(10**6, 16, 128) == 256 * 16 * 16 * 128 * 10
    assert kmeans_work(1000, 16, 128) == 1000 * 16 * 128 * 10
    assert kmeans_work(1000, None, 128) == 0


@pytest.mark.parametrize("name", ["entries", "pairs", "machines"])
def test_a_size_below_one_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, expected 1 or more"):
        replace(SIZE, **{name: 0})


@pytest.fixture
def config(tmp_path: Path) -> DatastoreConfig:
    corpus = write_corpus(tmp_path / "corpus.jsonl", corpus_pairs(600))
    return DatastoreConfig(tmp_path / "store", corpus, max_tokens=400, shard_entries=1500)


@pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ4x4fs,Refine(SQfp16)", "IVF16_HNSW8,SQ8"])
@pytest.mark.filterwarnings("ignore")
def test_predicted_sizes_are_those_of_a_build(backbone: Backbone, config: DatastoreConfig, factory: str) -> None:
    index = IndexConfig(factory)
    planned = make_plan(backbone, config, index, sample_pairs=150)
    assert not config.folder.exists()
    assert [path.name for path in config.folder.parent.iterdir()] == ["corpus.jsonl"]
    manifest = build_datastore(backbone, config).manifest
    with Datastore(config.folder) as store:
        report = build_index(store, index)
    assert planned.size.pairs == manifest.pairs
    assert planned.size.entries == manifest.entries  # all lengths were counted
    assert abs(len(planned.size.shards) - len(manifest.shards)) <= 1
    shards = sum((config.folder / shard.file).stat().st_size for shard in manifest.shards)
    disk = planned.disk
    assert disk.keys + disk.values + disk.texts == pytest.approx(shards, rel=0.05)
    assert disk.index == pytest.approx((config.folder / "index.faiss").stat().st_size, rel=0.05)
    assert (planned.size.nlist, planned.size.train_points) == (report.nlist, report.train_points)
    assert set(report.seconds) <= {stage.name for stage in planned.stages}
    assert all(stage.seconds >= 0 for stage in planned.stages)


def test_other_numbers_of_entries_are_extrapolated(backbone: Backbone, config: DatastoreConfig) -> None:
    few = make_plan(backbone, config, IndexConfig("Flat"), sample_pairs=50)
    many = make_plan(backbone, config, IndexConfig("Flat"), entries=1_000_000, sample_pairs=50)
    assert many.size.entries == 1_000_000
    assert many.size.pairs == pytest.approx(1_000_000 * few.size.pairs / few.size.entries, rel=0.1)
    assert many.disk.keys == 2 * 1_000_000 * backbone.key_size
    assert many.disk.index == pytest.approx(4 * 1_000_000 * backbone.key_size, rel=0.01)


def test_a_sample_is_uniform_and_counts_all_pairs(config: DatastoreConfig) -> None:
    sample = sample_corpus(config.corpus, 100)
    assert sample.pairs == 600
    numbers = [int(pair.src.split()[0]) for pair in sample.sample]
    assert numbers == sorted(set(numbers))
    assert len(numbers) == 100
    assert 230 < sum(numbers) / 100 < 370
    assert len(sample_corpus(config.corpus, 1000).sample) == 600


def test_the_options_of_a_build_print_a_plan(
    backbone: Backbone, config: DatastoreConfig, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        planned = plan(backbone, config, IndexConfig(), Processes(), sample_pairs=50)
    assert capsys.readouterr().out == planned.to_text() + "\n"
    assert planned.size.factory == choose_factory(planned.size.entries, backbone.key_size)
    for word in ("entries", "shards", "disk", "peak memory", "encode", "add", "write", "in all", "uncertain"):
        assert word in planned.to_text()


def test_what_cannot_be_planned_is_refused(backbone: Backbone, config: DatastoreConfig, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="entries is 0, expected 1 or more"):
        plan(backbone, config, entries=0)
    with pytest.raises(ValueError, match="machines is 0, expected 1 or more"):
        plan(backbone, config, machines=0)
    with pytest.raises(ValueError, match="sample_pairs is 0, expected 1 or more"):
        plan(backbone, config, sample_pairs=0)
    with pytest.raises(ValueError, match="factory is 'Nonsense', which FAISS cannot make"):
        plan(backbone, config, IndexConfig("Nonsense"))
    with pytest.raises(ValueError, match="with 8192 lists, but there are only"):
        plan(backbone, config, IndexConfig("IVF8192,Flat"), sample_pairs=50)
    empty = tmp_path / "empty.jsonl"
    empty.touch()
    with pytest.raises(ValueError, match=r"empty\.jsonl has no pairs, expected at least 1 to plan from"):
        plan(backbone, replace(config, corpus=replace(config.corpus, path=empty)))
