"""Metrics against FAISS, scikit-learn and numpy; pieces and processes add up; samples are uniform."""

import faiss
import numpy as np
import pytest
import torch
from sklearn.metrics import homogeneity_score
from tiny_stores import clumpy_keys

from lightning_knnmt.index.balance import imbalance, scanned
from lightning_knnmt.index.splitting import split_centroids
from lightning_knnmt.training.index_health import nearest_lists
from lightning_knnmt.training.metrics import (
    Homogeneity,
    ImbalanceFactor,
    KeySample,
    MeanResultantLength,
    SphericalVariance,
)

KEYS, TOKENS = clumpy_keys(700, 16)
NLIST = 12


def ivf(seed: int = 3) -> faiss.IndexIVFFlat:
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(16), 16, NLIST)
    index.cp.seed = seed
    index.train(KEYS.astype(np.float32))
    index.add(KEYS.astype(np.float32))
    return index


def assigned(seed: int = 3) -> torch.Tensor:
    """The list of each key, as IndexHealth makes them."""
    keys = KEYS.astype(np.float32)
    centroids = split_centroids(keys, NLIST, share=0.0, seed=seed)
    return nearest_lists(torch.from_numpy(keys), torch.from_numpy(centroids), 1, chunk=100)[:, 0]


def test_assigned_lists_are_those_of_faisss_own_inverted_file() -> None:
    lists = assigned().numpy()
    index = ivf(seed=3)
    for number in range(NLIST):
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), index.invlists.list_size(number))
        assert sorted(ids) == np.flatnonzero(lists == number).tolist()


def test_probed_lists_are_those_of_brute_force() -> None:
    keys, centroids = KEYS[:50].astype(np.float32), KEYS[100:109].astype(np.float32)
    distances = ((keys[:, None] - centroids[None]) ** 2).sum(-1)
    found = nearest_lists(torch.from_numpy(keys), torch.from_numpy(centroids), 4, chunk=7)
    assert np.array_equal(found.numpy(), distances.argsort(axis=1)[:, :4])


def test_imbalance_is_faisss_own_figure_however_the_entries_come() -> None:
    lists = assigned()
    metric = ImbalanceFactor(NLIST)
    for piece in lists.split(111):
        metric.update(piece)
    assert float(metric.compute()) == pytest.approx(ivf(seed=3).invlists.imbalance_factor())
    assert float(metric.compute()) > 1.05


def test_homogeneity_is_that_of_scikit_learn_however_the_entries_come() -> None:
    lists = assigned().numpy()
    metric = Homogeneity()
    for rows in np.array_split(np.arange(len(lists)), 5):
        metric.update(torch.from_numpy(lists[rows]), torch.from_numpy(TOKENS[rows].astype(np.int64)))
    assert 0 < float(metric.compute()) < 1
    assert float(metric.compute()) == pytest.approx(homogeneity_score(TOKENS, lists))


@pytest.mark.parametrize("shift", [0.0, 0.7, 50.0])
def test_resultant_length_and_variance_are_those_of_numpy(shift: float) -> None:
    keys = np.random.default_rng(1).normal(size=(500, 9)) + shift
    unit = keys / np.linalg.norm(keys, axis=1, keepdims=True)
    expected = np.linalg.norm(unit.mean(axis=0))
    length, variance = MeanResultantLength(9), SphericalVariance(9)
    for piece in torch.from_numpy(keys).float().split(77):
        length.update(piece)
        variance.update(piece)
    assert float(length.compute()) == pytest.approx(expected, abs=1e-5)
    assert float(variance.compute()) == pytest.approx(1 - expected, abs=1e-5)


def test_opposite_keys_balance_and_zero_keys_do_not_count() -> None:
    metric = MeanResultantLength(2)
    metric.update(torch.tensor([[3.0, 0.0], [-0.1, 0.0], [0.0, 0.0]]))
    assert float(metric.compute()) == pytest.approx(0, abs=1e-6)
    metric.update(torch.tensor([[0.0, 7.0]]))
    assert float(metric.compute()) == pytest.approx(1 / 3)


def test_metrics_of_two_processes_add_up_to_that_of_all_entries() -> None:
    lists, tokens = assigned(), torch.from_numpy(TOKENS).long()
    keys = torch.from_numpy(KEYS).float()
    for make, inputs in (
        (lambda: ImbalanceFactor(NLIST), (lists,)),
        (Homogeneity, (lists, tokens)),
        (lambda: MeanResultantLength(16), (keys,)),
        (lambda: SphericalVariance(16), (keys,)),
    ):
        whole, first, second = make(), make(), make()
        whole.update(*inputs)
        first.update(*(part[::2] for part in inputs))
        second.update(*(part[1::2] for part in inputs))
        first.merge_state(second)
        assert float(first.compute()) == pytest.approx(float(whole.compute()), rel=1e-5)


def test_metrics_stay_on_the_device_of_their_inputs() -> None:
    device = torch.device("meta")  # whatever leaves it for the CPU fails
    length = MeanResultantLength(16).to(device)
    length.total = torch.empty(16, device=device)
    assert length.compute().device == device
    sizes = torch.empty(NLIST, dtype=torch.long, device=device)
    assert (
        imbalance(sizes).device == scanned(sizes, torch.empty(5, 2, dtype=torch.long, device=device)).device == device
    )
    metric = ImbalanceFactor(NLIST).to(device)
    assert metric.compute().device == device


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ImbalanceFactor(0), "nlist is 0, expected 1 or more"),
        (lambda: KeySample(0), "max_keys is 0, expected 1 or more"),
        (
            lambda: ImbalanceFactor(4).update(torch.tensor([1, 4])),
            "lists holds numbers from 1 to 4, expected 0 to nlist - 1 = 3",
        ),
        (
            lambda: Homogeneity().update(torch.tensor([1, 2]), torch.tensor([1])),
            r"lists has shape \(2,\) and tokens \(1,\), expected one of each per entry",
        ),
    ],
)
def test_wrong_inputs_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# ---- the sample


def stream(size: int) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.arange(size)
    return torch.stack([tokens.float(), -tokens.float()], dim=1), tokens


def sampled(size: int, max_keys: int, seed: int = 1, piece: int = 13) -> torch.Tensor:
    sample = KeySample(max_keys, seed)
    for keys, tokens in zip(*(part.split(piece) for part in stream(size)), strict=True):
        sample.update(keys, tokens)
    keys, tokens = sample.compute()
    assert torch.equal(keys, stream(size)[0][tokens]), "keys stay with their tokens"
    return tokens


def test_a_short_stream_is_kept_whole() -> None:
    assert sampled(50, 50).sort().values.tolist() == sampled(50, 900).sort().values.tolist() == list(range(50))


def test_a_sample_has_no_entry_twice_and_is_the_same_for_the_same_seed() -> None:
    tokens = sampled(1000, 60)
    assert len(set(tokens.tolist())) == len(tokens) == 60
    assert torch.equal(tokens, sampled(1000, 60)) and not torch.equal(tokens, sampled(1000, 60, seed=2))
    sample = KeySample(60)
    sample.update(*stream(1000))
    first = sample.compute()[1]
    sample.reset()
    sample.update(*stream(1000))
    assert torch.equal(sample.compute()[1], first)


def test_every_place_of_the_stream_is_as_likely_in_a_sample() -> None:
    counts = torch.zeros(200)
    for seed in range(400):
        counts[sampled(200, 50, seed, piece=17)] += 1
    assert counts.sum() == 400 * 50
    chi_square = float(((counts - 100) ** 2 / (100 * 0.75)).sum())  # variance of a binomial with p = 1/4
    assert 140 < chi_square < 270  # 199 degrees of freedom: mean 199, standard deviation 20
    assert abs(float(counts[:100].sum()) / 20_000 - 0.5) < 0.02


def test_processes_draw_differently_and_merge_to_one_sample() -> None:
    keys, tokens = stream(400)
    first, second, twin = KeySample(100, rank=0), KeySample(100, rank=1), KeySample(100, rank=1)
    first.update(keys[:200], tokens[:200])
    second.update(keys[200:], tokens[200:])
    twin.update(keys[:200], tokens[:200])
    first.merge_state(second)
    assert set(twin.compute()[1].tolist()) != set(sampled(200, 100, piece=200).tolist())
    merged = first.compute()[1]
    assert len(set(merged.tolist())) == 100
    assert 25 < int((merged < 200).sum()) < 75


def test_a_sample_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="no keys were offered to the sample, expected a batch or more before compute"):
        KeySample(5).compute()
