"""How evenly an inverted-file index is filled, and how pure its lists are."""

import torch
from torch import Tensor


def imbalance_factor(sizes: Tensor) -> float:
    """Imbalance factor nlist · Σ n_i² / (Σ n_i)² of FAISS's inverted lists: 1 is perfect.

    If queries follow the data, a probe scans this many times the codes that it would in an even index.

    Args:
        sizes: Entries of each list, shape (nlist,).

    Returns:
        The factor; 1 for an empty index.

    >>> imbalance_factor(torch.tensor([3, 1, 0, 0]))
    2.5
    """
    counts = sizes.double()
    total = float(counts.sum())
    return 1.0 if total == 0 else len(counts) * float((counts**2).sum()) / total**2


def homogeneity(lists: Tensor, tokens: Tensor) -> float:
    """Homogeneity 1 − H(token | list) / H(token): 1 if each list holds entries of one token only.

    Args:
        lists: The list of each entry, shape (N,).
        tokens: The target-token id of each entry, shape (N,).

    Returns:
        A value in [0, 1]; 1 if there is only one token.

    >>> homogeneity(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 7]))
    1.0
    """
    if not len(tokens):
        return 1.0
    vocabulary = int(tokens.max()) + 1
    pairs = counts = torch.empty(0, dtype=torch.long, device=tokens.device)
    chunk = max(1 << 20, len(tokens) // 16)  # far fewer pairs than entries are different: there are many entries
    for of_lists, of_tokens in zip(lists.split(chunk), tokens.split(chunk), strict=True):
        found, times = (of_lists.long() * vocabulary + of_tokens.long()).unique(return_counts=True)
        pairs, places = torch.cat([pairs, found]).unique(return_inverse=True)
        counts = torch.zeros_like(pairs).index_add_(0, places, torch.cat([counts, times]))
    token_entropy = _entropy((pairs % vocabulary).bincount(counts))
    if token_entropy == 0:
        return 1.0
    list_entropy = _entropy((pairs // vocabulary).bincount(counts))
    return 1.0 - max(0.0, _entropy(counts) - list_entropy) / token_entropy


def _entropy(counts: Tensor) -> float:
    return float(torch.special.entr(counts.double() / counts.sum()).sum())
