"""The largest logits of each row without sorting a vocabulary."""

import torch
from torch import Tensor

_BLOCK = 128


def top_columns(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row and their columns, largest first; each of shape (R, k).

    The k largest stand in the k blocks whose largest are largest: one pass over (R, V), then k blocks are sorted. For
    k = 1, the first of equal ones is taken, as argmax does.

    Args:
        logits: Shape (R, V).
        k: At most V.

    >>> top_columns(torch.tensor([[1.0, 3.0, 2.0]]), 2)
    (tensor([[3., 2.]]), tensor([[1, 2]]))
    """
    blocks = logits.shape[1] // _BLOCK
    if blocks < 4 * k:
        return _top(logits, k)
    whole = blocks * _BLOCK
    blocked = logits[:, :whole].unflatten(1, (blocks, _BLOCK))  # [R, V] -> [R, blocks, block]
    chosen = _top(blocked.amax(2), k)[1].sort(1)[0]  # [R, k], ascending, so that first stays first
    inside = blocked.gather(1, chosen[:, :, None].expand(-1, -1, _BLOCK)).flatten(1)  # [R, k * block]
    values, places = _top(torch.cat([inside, logits[:, whole:]], 1), k)
    block = chosen.gather(1, (places // _BLOCK).clamp(max=k - 1))
    columns = torch.where(places < k * _BLOCK, block * _BLOCK + places % _BLOCK, places - k * _BLOCK + whole)
    return values, columns


def _top(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    if k == 1:
        columns = values.argmax(1, keepdim=True)
        return values.gather(1, columns), columns
    found = values.topk(k, 1)
    return found.values, found.indices
