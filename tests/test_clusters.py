"""Imbalance and homogeneity of clusters against closed forms and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.metrics import homogeneity_score

from lightning_knnmt.index.balance import homogeneity, imbalance_factor


@pytest.mark.parametrize("nlist", [2, 7, 64])
def test_imbalance_is_1_when_even_and_nlist_when_all_is_in_one_list(nlist: int) -> None:
    assert imbalance_factor(torch.full((nlist,), 13)) == pytest.approx(1)
    one = torch.zeros(nlist, dtype=torch.long)
    one[nlist // 2] = 13
    assert imbalance_factor(one) == pytest.approx(nlist)


def test_imbalance_is_the_expected_scan_of_a_random_entry_relative_to_even_lists() -> None:
    sizes = torch.from_numpy(np.random.default_rng(0).geometric(0.02, 50))
    own_list = torch.repeat_interleave(sizes, sizes).double()  # [entry -> entries of its list]
    assert imbalance_factor(sizes) == pytest.approx(float(own_list.mean() / sizes.double().mean()))


def test_imbalance_does_not_overflow_at_billions_of_entries() -> None:
    sizes = torch.tensor([3_000_000_000, 1_000_000_000])
    assert imbalance_factor(sizes) == pytest.approx(2 * (9 + 1) / 16)


def test_imbalance_of_an_empty_index_is_1() -> None:
    assert imbalance_factor(torch.zeros(5, dtype=torch.long)) == 1


@pytest.mark.parametrize("purity", [0.0, 0.4, 0.95, 1.0])
def test_homogeneity_is_that_of_scikit_learn(purity: float) -> None:
    rng = np.random.default_rng(int(100 * purity))
    tokens = rng.zipf(1.5, 3000).clip(max=40)
    lists = np.where(rng.random(3000) < purity, tokens % 23, rng.integers(0, 23, 3000))
    ours = homogeneity(torch.from_numpy(lists), torch.from_numpy(tokens.astype(np.int32)))
    assert ours == pytest.approx(homogeneity_score(tokens, lists), abs=1e-9)


def test_homogeneity_of_one_token_or_of_nothing_is_1() -> None:
    assert homogeneity(torch.tensor([0, 3, 1]), torch.tensor([7, 7, 7])) == 1
    assert homogeneity(torch.empty(0, dtype=torch.long), torch.empty(0, dtype=torch.long)) == 1


def test_homogeneity_of_more_entries_than_are_counted_at_once_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.zipf(1.3, (1 << 20) + 5).clip(max=500)
    lists = (tokens + rng.integers(0, 4, len(tokens))) % 37
    ours = homogeneity(torch.from_numpy(lists.astype(np.int32)), torch.from_numpy(tokens.astype(np.int32)))
    assert ours == pytest.approx(homogeneity_score(tokens, lists), abs=1e-9)
