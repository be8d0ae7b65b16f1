"""The layers of Firefox Translations models, as Marian computes them: norms behind the sub-layers, sums before."""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_knnmt.backbone.firefox.configuration import FirefoxConfig


def sinusoids(length: int, size: int) -> Tensor:
    """Marian's positions 0 to `length` - 1, shape (length, size): sines in the first half, cosines in the second.

    The frequency of dimension i is exp(-i ln 10000 / (size / 2 - 1)). Hugging Face's Marian divides by size / 2, which
    gives other translations.

    >>> sinusoids(2, 4)
    tensor([[0.0000e+00, 0.0000e+00, 1.0000e+00, 1.0000e+00],
            [8.4147e-01, 1.0000e-04, 5.4030e-01, 1.0000e+00]])
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float64)
    angles = torch.arange(length, dtype=torch.float64)[:, None] * torch.exp(-steps * math.log(10000) / (half - 1))
    return torch.cat([angles.sin(), angles.cos()], dim=1).float()


class Embedding(nn.Module):
    """Token embeddings times √D, plus positions; padding embeds as zeros, whatever its row holds.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__()
        self.pad_id = cast(int, config.pad_token_id)
        self.scale, self.dropout = math.sqrt(config.d_model), config.dropout
        self._positions = torch.empty(0, config.d_model)  # no buffer: made anew wherever it is needed

    def forward(self, tokens: nn.Embedding, ids: Tensor, start: int | Tensor = 0) -> Tensor:
        """Embed ids of shape (R, T) that stand at positions `start` and after, giving (R, T, D).

        Args:
            tokens: The embeddings.
            ids: Token ids.
            start: The first one's position; a tensor (R,): those of single tokens, T = 1.
        """
        scale = (ids != self.pad_id).unsqueeze(-1) * self.scale  # [R, T, 1]
        weight = tokens.weight
        embedded = F.embedding(ids, weight) * scale.to(weight.dtype)
        if isinstance(start, Tensor):
            positions = self._table(int(start.max()) + 1, weight)[start].unsqueeze(1)  # [R, 1, D]
        else:
            positions = self._table(start + ids.shape[1], weight)[start : start + ids.shape[1]]
        return F.dropout(embedded + positions, self.dropout, self.training)

    def _table(self, length: int, like: Tensor) -> Tensor:
        if (
            len(self._positions) < length
            or self._positions.device != like.device
            or self._positions.dtype != like.dtype
        ):
            with torch.inference_mode(False), torch.no_grad():
                longer = 1 << (length - 1).bit_length()
                self._positions = sinusoids(longer, like.shape[1]).to(like.device, like.dtype)
        return self._positions


class Attention(nn.Module):
    """Multi-head attention.

    Args:
        size: D.
        heads: H; D = H × d.
    """

    def __init__(self, size: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(size, size) for _ in range(4))

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of states (B, S, D), each of shape (B, H, S, d)."""
        return self._split(self.k_proj(states)), self._split(self.v_proj(states))

    def forward(self, states: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
        """Let the states (B, T, D) attend to keys and values (B, H, S, d) where the mask (B, 1, 1, S) is true."""
        queries = self._split(self.q_proj(states))
        attended = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask)  # [B, H, T, d]
        return self.out_proj(attended.transpose(1, 2).reshape(states.shape))

    def _split(self, states: Tensor) -> Tensor:
        rows, length, size = states.shape
        return states.view(rows, length, self.heads, size // self.heads).transpose(1, 2)  # [B, T, D] -> [B, H, T, d]


class SSRU(nn.Module):
    """The simpler simple recurrent unit (arXiv 1909.07155, after arXiv 1709.02755).

    f_t = σ(W_f x_t + b_f), c_t = f_t ⊙ c_{t-1} + (1 - f_t) ⊙ W x_t, output relu(c_t).

    Args:
        size: D.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self.candidate = nn.Linear(size, size, bias=False)
        self.forget = nn.Linear(size, size)

    def forward(self, states: Tensor, cell: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run over states (R, T, D) from a cell (R, D), None at the beginning; gives outputs (R, T, D) and the cell.

        Cells are float32 whatever the type of the weights.
        """
        steps = states.transpose(0, 1)  # [R, T, D] -> [T, R, D], so that each step's rows lie together
        kept = torch.sigmoid(self.forget(steps).float())
        new = (1 - kept) * self.candidate(steps).float()
        cells = []
        for keep, add in zip(kept.unbind(0), new.unbind(0), strict=True):
            cell = add if cell is None else torch.addcmul(add, keep, cell)
            cells.append(cell)
        assert cell is not None, "there is one step or more"
        outputs = F.relu(torch.stack(cells)).to(states.dtype)
        return outputs.transpose(0, 1), cell


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward part.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__()
        size, eps = config.d_model, config.layer_norm_eps
        self.dropout = config.dropout
        self.self_attn = Attention(size, config.encoder_attention_heads)
        self.self_attn_layer_norm = nn.LayerNorm(size, eps)
        self.fc1 = nn.Linear(size, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, size)
        self.final_layer_norm = nn.LayerNorm(size, eps)

    def forward(self, states: Tensor, mask: Tensor | None) -> Tensor:
        """States (B, S, D) to states."""
        attended = self.self_attn(states, *self.self_attn.keys_and_values(states), mask)
        states = self.self_attn_layer_norm(states + F.dropout(attended, self.dropout, self.training))
        output = self.fc2(F.relu(self.fc1(states), inplace=True))
        return self.final_layer_norm(states + F.dropout(output, self.dropout, self.training))


class DecoderLayer(nn.Module):
    """Recurrent unit, attention to the source and feed-forward part.

    Args:
        config: Sizes.
    """

    def __init__(self, config: FirefoxConfig) -> None:
        super().__init__()
        size, eps = config.d_model, config.layer_norm_eps
        self.dropout = config.dropout
        self.rnn = SSRU(size)
        self.rnn_layer_norm = nn.LayerNorm(size, eps)
        self.encoder_attn = Attention(size, config.decoder_attention_heads)
        self.encoder_attn_layer_norm = nn.LayerNorm(size, eps)
        self.fc1 = nn.Linear(size, config.decoder_ffn_dim)
        self.fc2 = nn.Linear(config.decoder_ffn_dim, size)
        self.final_layer_norm = nn.LayerNorm(size, eps)

    def forward(
        self, states: Tensor, cell: Tensor | None, keys: Tensor, values: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """States (R, T, D) and cell (R, D) to states and cell; B of the source divides R."""
        output, cell = self.rnn(states, cell)
        states = self.rnn_layer_norm(states + F.dropout(output, self.dropout, self.training))
        together = states.reshape(len(keys), -1, states.shape[-1])  # [R, T, D] -> [B, R / B * T, D], a source's rows
        attended = self.encoder_attn(together, keys, values, mask).view(states.shape)
        states = self.encoder_attn_layer_norm(states + F.dropout(attended, self.dropout, self.training))
        output = self.fc2(F.relu(self.fc1(states), inplace=True))
        return self.final_layer_norm(states + F.dropout(output, self.dropout, self.training)), cell
