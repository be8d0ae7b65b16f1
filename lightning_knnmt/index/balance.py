"""How evenly an inverted-file index is filled, and how pure its lists are."""

import torch
from torch import Tensor


def imbalance(sizes: Tensor) -> Tensor:
    """Imbalance factor nlist · Σ n_i² / (Σ n_i)² of FAISS's inverted lists: 1 is perfect.

    If queries follow the data, a probe scans this many times the codes that it would in an even index.

    Args:
        sizes: Entries of each list, shape (nlist,).

    Returns:
        Scalar, float64, on the device of the sizes; 1 for an empty index.

    >>> imbalance(torch.tensor([3, 1, 0, 0]))
    tensor(2.5000, dtype=torch.float64)
    """
    counts = sizes.double()
    total = counts.sum()
    return torch.where(total == 0, 1.0, len(counts) * counts.square().sum() / total.square())


def purity(lists: Tensor, tokens: Tensor) -> Tensor:
    """Homogeneity 1 − H(token | list) / H(token): 1 if each list holds entries of one token only.

    Args:
        lists: The list of each entry, shape (N,).
        tokens: The target-token id of each entry, shape (N,).

    Returns:
        Scalar in [0, 1], float64, on the device of the tokens; 1 if there is only one token, or no entry.

    >>> purity(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 7]))
    tensor(1., dtype=torch.float64)
    """
    if not len(tokens):
        return torch.ones((), dtype=torch.float64, device=tokens.device)
    vocabulary = int(tokens.max()) + 1
    pairs = counts = torch.empty(0, dtype=torch.long, device=tokens.device)
    chunk = max(1 << 20, len(tokens) // 16)  # far fewer pairs than entries are different: there are many entries
    for of_lists, of_tokens in zip(lists.split(chunk), tokens.split(chunk), strict=True):
        found, times = (of_lists.long() * vocabulary + of_tokens.long()).unique(return_counts=True)
        pairs, places = torch.cat([pairs, found]).unique(return_inverse=True)
        counts = torch.zeros_like(pairs).index_add_(0, places, torch.cat([counts, times]))
    token_entropy = _entropy((pairs % vocabulary).bincount(counts))
    list_entropy = _entropy((pairs // vocabulary).bincount(counts))
    return torch.where(token_entropy == 0, 1.0, 1.0 - (_entropy(counts) - list_entropy).clamp(min=0) / token_entropy)


def imbalance_factor(sizes: Tensor) -> float:
    """`imbalance` as a plain number, for reports.

    >>> imbalance_factor(torch.tensor([3, 1, 0, 0]))
    2.5
    """
    return float(imbalance(sizes))


def homogeneity(lists: Tensor, tokens: Tensor) -> float:
    """`purity` as a plain number, for reports.

    >>> homogeneity(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 7]))
    1.0
    """
    return float(purity(lists, tokens))


def scanned(sizes: Tensor, probed: Tensor) -> Tensor:
    """Mean number of codes that a query scans: the entries of the lists that it probes.

    Args:
        sizes: Entries of each list, shape (nlist,).
        probed: The lists that each query probes, shape (R, nprobe).

    Returns:
        Scalar, float64, on the device of the sizes.

    >>> scanned(torch.tensor([3, 1, 0]), torch.tensor([[0, 1], [2, 1]]))
    tensor(2.5000, dtype=torch.float64)
    """
    return sizes.double()[probed].sum(dim=1).mean()


def _entropy(counts: Tensor) -> Tensor:
    return torch.special.entr(counts.double() / counts.sum()).sum()
