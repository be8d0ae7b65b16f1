"""How evenly an inverted-file index is filled, and how pure its lists are."""

from torch import Tensor


def imbalance_factor(sizes: Tensor) -> float:
    """Imbalance factor nlist · Σ n_i² / (Σ n_i)² of FAISS's inverted lists: 1 is perfect.

    If queries follow the data, a probe scans this many times the codes that it would in an even index.

    Args:
        sizes: Entries of each list, shape (nlist,).

    Returns:
        The factor; 1 for an empty index.

    >>> import torch
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

    >>> import torch
    >>> homogeneity(torch.tensor([0, 0, 1, 1]), torch.tensor([5, 5, 7, 7]))
    1.0
    """
    token_entropy = _entropy(tokens.unique(return_counts=True)[1])
    if token_entropy == 0:
        return 1.0
    joint = lists.long() * (int(tokens.max()) + 1) + tokens.long()
    joint_entropy = _entropy(joint.unique(return_counts=True)[1])
    list_entropy = _entropy(lists.unique(return_counts=True)[1])
    return 1.0 - max(0.0, joint_entropy - list_entropy) / token_entropy


def _entropy(counts: Tensor) -> float:
    shares = counts.double() / counts.sum()
    return float(-(shares * shares.log()).sum())
