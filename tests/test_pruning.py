"""Smaller datastores: what is dropped is what the rule says, and what is left is a datastore like any other."""

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_stores import build_store, clumpy_keys, corpus_pairs, harm_file, write_corpus, write_store

import lightning_knnmt.building.pruning.pruning as walk
from lightning_knnmt.backbone.keyed_model import KeyedModel
from lightning_knnmt.building.append import append_pairs
from lightning_knnmt.building.compact import compact
from lightning_knnmt.building.copying import Copying
from lightning_knnmt.building.datastore import DatastoreConfig, build_datastore
from lightning_knnmt.building.index import build_index
from lightning_knnmt.building.pruning.gathering import Gathering
from lightning_knnmt.building.pruning.merging import merge_greedily
from lightning_knnmt.building.pruning.pruning import EVIDENCE, prune
from lightning_knnmt.building.pruning.rules import (
    Evidence,
    GreedyMerging,
    KnowledgeMarginPruning,
    PruningRule,
    RandomPruning,
    knowledge_margins,
)
from lightning_knnmt.building.remove import remove_documents
from lightning_knnmt.building.verify import verify
from lightning_knnmt.data.readers import CorpusFile
from lightning_knnmt.datastore import Datastore, Manifest
from lightning_knnmt.index.config import IndexConfig
from lightning_knnmt.knn.combiners.fixed import FixedCombiner
from lightning_knnmt.knn.step import Step
from lightning_knnmt.memory import open_memory
from lightning_knnmt.storage.artifact import Artifact
from lightning_knnmt.storage.errors import DatastoreError
from lightning_knnmt.storage.layout import MANIFEST

FLAT = IndexConfig("Flat")
PAIRS = corpus_pairs(60)
NOTHING: list[PruningRule] = [RandomPruning(share=0), KnowledgeMarginPruning(share=0, margin=2)]


@pytest.fixture
def folder(backbone: KeyedModel, tmp_path: Path) -> Path:
    """A datastore of a tiny model in several shards, with an exact index."""
    with build_store(backbone, tmp_path / "store", PAIRS, shard_pairs=12) as store:
        build_index(store, FLAT)
    return tmp_path / "store"


@pytest.fixture
def knowing(backbone: KeyedModel, folder: Path, monkeypatch: pytest.MonkeyPatch) -> KeyedModel:
    """The model, predicting the token whose stored keys' mean is nearest: right for many entries, wrong for many."""
    with Datastore(folder) as store:
        keys, values = torch.from_numpy(keys_of(store)).float(), store.values
    means = torch.full((backbone.vocabulary_size, backbone.key_size), 1e3)
    for token in set(values.tolist()):
        means[token] = keys[torch.from_numpy(values == token)].mean(0)
    monkeypatch.setattr(type(backbone), "project", lambda self, states: -torch.cdist(states.float(), means))
    return backbone


def keys_of(store: Datastore) -> np.ndarray:
    return np.concatenate(list(store.key_chunks()))


def places(store: Datastore) -> list[tuple[int, int, int]]:
    """The pair, the position and the token of every entry."""
    contexts = map(store.context, range(len(store)))
    return [(c.number, c.position, int(v)) for c, v in zip(contexts, store.values, strict=True)]


def brute_neighbors(keys: np.ndarray, k: int) -> np.ndarray:
    distances = ((keys[:, None].astype(np.float64) - keys[None]) ** 2).sum(2)
    np.fill_diagonal(distances, np.inf)
    return np.argsort(distances, axis=1, kind="stable")[:, :k]


@pytest.mark.parametrize("rule", NOTHING, ids=repr)
def test_pruned_by_nothing_is_the_store(backbone: KeyedModel, folder: Path, tmp_path: Path, rule: PruningRule) -> None:
    made = prune(folder, tmp_path / "new", rule, backbone, FLAT)
    with Datastore(folder) as store, Datastore(tmp_path / "new") as new:
        assert [(s.entries, s.pairs) for s in new.manifest.shards] == [
            (s.entries, s.pairs) for s in store.manifest.shards
        ]
        for one, other in zip(store.shards, new.shards, strict=True):
            assert list(one.file) == list(other.file)
            assert all((one.file[name][:] == other.file[name][:]).all() for name in one.file)
        assert made.manifest.pruned[-1].entries == len(store)
    assert (made.manifest.pruned[-1].dropped, made.manifest.pruned[-1].pairs) == ({}, 0)
    queries = torch.randn(5, backbone.key_size)
    with open_memory(folder) as before, open_memory(tmp_path / "new") as after:
        for one, other in zip(before.search(queries, 4).parts, after.search(queries, 4).parts, strict=True):
            assert torch.equal(one, other)


def test_random_pruning_drops_the_share(folder: Path, tmp_path: Path) -> None:
    made = prune(folder, tmp_path / "new", RandomPruning(share=0.3, seed=5), index=FLAT)
    with Datastore(folder) as store, Datastore(tmp_path / "new") as new:
        dropped = round(0.3 * len(store))
        assert made.manifest.pruned[-1].dropped == {"at random": dropped}
        assert len(new) == len(store) - dropped
        before = dict(zip(places(store), keys_of(store).tolist(), strict=True))
        for place, key in zip(places(new), keys_of(new).tolist(), strict=True):
            assert before[place] == key
        assert new.weights is None


def test_the_knowledge_margin_is_that_of_brute_force(knowing: KeyedModel, folder: Path, tmp_path: Path) -> None:
    with Datastore(folder) as store:
        keys = keys_of(store).astype(np.float32)
        right = (knowing.project(torch.from_numpy(keys)).argmax(1).numpy() == store.values).tolist()
        rule = KnowledgeMarginPruning(share=1, margin=3)
        evidence = Gathering(store, tmp_path / "evidence").evidence(rule, knowing, "index", 1)
    assert evidence.predicted.tolist() == right
    distances = ((keys[:, None] - keys[None]) ** 2).sum(2)
    margins = knowledge_margins(evidence.neighbors, evidence.predicted)
    assert set(margins.tolist()) == {0, 1, 2, 3}
    for entry, (near, margin) in enumerate(zip(evidence.neighbors, margins, strict=True)):
        nearest = np.sort(np.delete(distances[entry], entry))[: len(near)]
        assert np.allclose(distances[entry, near], nearest, rtol=1e-3, atol=1e-3)  # ties may be in any order
        expected = len(list(itertools.takewhile(bool, (right[other] for other in (entry, *near)))))
        assert margin == expected


def test_only_entries_that_the_model_knows_are_dropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    keys, values = clumpy_keys(400, 6)
    predicted = rng.random(400) < 0.8
    neighbors = brute_neighbors(keys, 3)
    evidence = Evidence(values, np.ones(400, np.int32), neighbors, predicted)
    margins = knowledge_margins(neighbors, predicted)
    whole = KnowledgeMarginPruning(share=1, margin=4).decide(evidence)
    assert (whole.kept == (margins < 4)).all() and 0 < (~whole.kept).sum() < 400
    few = KnowledgeMarginPruning(share=0.05, margin=4).decide(evidence)
    assert (~few.kept).sum() == 20 and (margins[~few.kept] >= 4).all()


def test_merging_keeps_the_weight_and_one_of_each_group() -> None:
    keys, values = clumpy_keys(300, 4)
    neighbors, before = brute_neighbors(keys, 4), np.arange(1, 301, dtype=np.int32)
    kept, weights = merge_greedily(neighbors, values, before)
    assert weights[kept].sum() == before.sum() and 0 < kept.sum() < 300
    for token in set(values.tolist()):
        of_token = values == token
        assert weights[kept & of_token].sum() == before[of_token].sum()
    plain_kept, plain_weights, taken = np.ones(300, bool), before.copy(), np.zeros(300, bool)
    for entry in range(300):
        for near in neighbors[entry]:
            mutual = entry in neighbors[near] and values[near] == values[entry]
            if mutual and plain_kept[entry] and plain_kept[near] and not taken[near]:
                plain_kept[near], taken[entry] = False, True
                plain_weights[entry] += plain_weights[near]
    assert (plain_kept == kept).all() and (plain_weights[kept] == weights[kept]).all()


def test_weights_of_merged_entries_count_in_the_distribution(tmp_path: Path) -> None:
    keys = np.repeat(np.array([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]], np.float16), [4, 1, 2], axis=0)
    values = np.repeat(np.array([5, 6, 7], np.int32), [4, 1, 2])
    with write_store(tmp_path / "store", keys, values, [3, 4]) as store:
        build_index(store, FLAT)
    made = prune(tmp_path / "store", tmp_path / "new", GreedyMerging(k=6), index=FLAT)
    assert made.manifest.entries == 3
    step = Step(torch.tensor([[1.0, 1.0]]), torch.randn(1, 9), torch.zeros(1))
    mixed = []
    for folder, k in (("store", 7), ("new", 3)):
        with open_memory(tmp_path / folder) as memory:
            mixed.append(FixedCombiner(0.6, 4.0)(step, memory.search(step.queries, k)).softmax(1))
    assert torch.allclose(*mixed, atol=1e-6)
    with Datastore(tmp_path / "new") as new:
        assert sorted(zip(new.values.tolist(), new.weights.tolist(), strict=True)) == [(5, 4), (6, 1), (7, 2)]


@pytest.mark.parametrize("stop_after", [0, 3, 9, 14, 15])
def test_a_pruning_that_is_killed_goes_on(
    knowing: KeyedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    rule = KnowledgeMarginPruning(share=0.4, margin=2)
    whole = prune(folder, tmp_path / "whole", rule, knowing, FLAT, chunk=100)

    class Killed(BaseException):
        pass

    done = []

    def counted(function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            if len(done) == stop_after:
                raise Killed
            done.append(function.__name__)
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        patched.setattr(Artifact, "write", counted(Artifact.write))
        patched.setattr(Copying, "write", counted(Copying.write))
        with pytest.raises(Killed):
            prune(folder, tmp_path / "new", rule, knowing, FLAT, chunk=100)
    with pytest.raises(DatastoreError, match=r"holds (an unfinished|no) datastore"):
        Datastore(tmp_path / "new")
    again = prune(folder, tmp_path / "new", rule, knowing, FLAT, chunk=100)
    assert again.manifest == whole.manifest
    assert not (tmp_path / "new" / EVIDENCE).exists()
    assert verify(tmp_path / "new") == []


def test_work_that_is_done_is_not_done_again(
    knowing: KeyedModel, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = KnowledgeMarginPruning(share=0.4, margin=2)
    made = prune(folder, tmp_path / "new", rule, knowing, FLAT)
    monkeypatch.setattr(walk, "_write", None)
    assert prune(folder, tmp_path / "new", rule, knowing, FLAT) == made
    with pytest.raises(DatastoreError, match="already holds another datastore"):
        prune(folder, tmp_path / "new", KnowledgeMarginPruning(share=0.3, margin=2), knowing, FLAT)


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed"])
def test_damage_is_found(folder: Path, tmp_path: Path, harm: str) -> None:
    made = prune(folder, tmp_path / "new", RandomPruning(share=0.5), index=FLAT)
    assert verify(tmp_path / "new") == []
    harm_file(tmp_path / "new" / made.manifest.shards[0].file, harm)
    assert [problem.file for problem in verify(tmp_path / "new")] == [made.manifest.shards[0].file]
    harm_file(folder / Manifest.load(folder).shards[0].file, harm)
    with pytest.raises(DatastoreError):
        prune(folder, tmp_path / "another", RandomPruning(share=0.5), index=FLAT)


def test_a_pruned_store_lives_on(backbone: KeyedModel, folder: Path, tmp_path: Path) -> None:
    made = prune(folder, tmp_path / "new", RandomPruning(share=0.5), index=FLAT)
    removal = remove_documents(tmp_path / "new", ["page-1"])
    assert removal.entries > 0
    before = made.manifest.entries - removal.entries
    with Datastore(tmp_path / "new") as new:
        left = [
            place for place, gone in zip(places(new), new.removed.covers(np.arange(len(new))), strict=True) if not gone
        ]
    compact(tmp_path / "new")
    with Datastore(tmp_path / "new") as new:
        assert len(new) == before and places(new) == left
        assert new.manifest.pruned == made.manifest.pruned
    twice = prune(tmp_path / "new", tmp_path / "twice", RandomPruning(share=0.5, seed=2), index=FLAT)
    assert len(twice.manifest.pruned) == 2
    with Datastore(tmp_path / "twice") as store:
        assert set(places(store)) <= set(left)
    config = DatastoreConfig(tmp_path / "twice", write_corpus(tmp_path / "more.jsonl", corpus_pairs(5, seed=9)))
    grown = append_pairs(backbone, config)
    with open_memory(tmp_path / "twice") as memory:
        assert len(memory) == grown.manifest.entries > len(left) // 2
    assert verify(tmp_path / "twice") == []


def test_removed_entries_are_neither_kept_nor_neighbors(folder: Path, tmp_path: Path) -> None:
    remove_documents(folder, ["page-0"])
    made = prune(folder, tmp_path / "new", GreedyMerging(k=3), index=FLAT)
    with Datastore(folder) as store, Datastore(tmp_path / "new") as new:
        assert made.manifest.pruned[-1].entries == len(store) - len(store.removed)
        assert new.manifest.removed is None
        assert all(new.context(entry).pair.document != "page-0" for entry in range(len(new)))
        total = len(new) if new.weights is None else new.weights.sum()
        assert total == len(store) - len(store.removed)


def test_what_cannot_be_is_refused(backbone: KeyedModel, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="backbone is missing, expected the datastore's model"):
        prune(folder, tmp_path / "new", KnowledgeMarginPruning(), index=FLAT)
    with pytest.raises(ValueError, match="the datastore itself, expected another folder"):
        prune(folder, folder, RandomPruning(), index=FLAT)
    with pytest.raises(ValueError, match="leaves no entry"):
        prune(folder, tmp_path / "new", RandomPruning(share=1), index=FLAT)
    with pytest.raises(ValueError, match="margin is 0, expected 1 or more"):
        KnowledgeMarginPruning(margin=0)
    with pytest.raises(ValueError, match="share is 2, expected 0 to 1"):
        RandomPruning(share=2)
    assert not (tmp_path / "new" / MANIFEST).exists()


def test_a_build_does_not_take_a_pruned_store_for_its_own(backbone: KeyedModel, folder: Path, tmp_path: Path) -> None:
    prune(folder, tmp_path / "new", RandomPruning(share=0.5), index=FLAT)
    config = DatastoreConfig(tmp_path / "new", CorpusFile(folder / "corpus.jsonl"), max_tokens=128, shard_pairs=12)
    with pytest.raises(DatastoreError, match="pruned 1 times against 0"):
        build_datastore(backbone, config)


def test_the_command_prunes_and_says_what_it_dropped(
    backbone: KeyedModel, folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import build_index as script

    rule = ("--rule", "RandomPruning", "--rule.share", "0.25")
    with caplog.at_level("INFO"):
        script.main(["prune", str(folder), "--out", str(tmp_path / "new"), *rule, "--index.factory", "Flat"])
    info = Manifest.load(tmp_path / "new").pruned[-1]
    assert (info.rule, info.options) == ("RandomPruning", {"share": 0.25, "seed": 1})
    with pytest.raises(SystemExit):
        script.main(["prune", str(folder)])
    with pytest.raises(SystemExit):
        script.main(["prune", str(folder), "--out", str(tmp_path / "other")])
