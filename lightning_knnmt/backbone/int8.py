"""Linear layers in 8-bit integers on CPUs, by torch's own dynamic quantization."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def int8_linear(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """F.linear with weights rounded to 8 bits, one scale for each output, and inputs rounded to 7 bits at each call.

    Seven bits, since sums of products of eight overflow on CPUs without instructions for them.

    Args:
        weight: Shape (out, in).
        bias: Shape (out,), or None.
    """
    weight = weight.detach().float()
    scales = weight.abs().amax(1).clamp(min=1e-12).double() / 127
    with warnings.catch_warnings():  # torch is to drop quantized tensors some day; this version has them
        warnings.simplefilter("ignore", UserWarning)
        zeros = torch.zeros(len(weight), dtype=torch.long)
        rounded = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(rounded, None if bias is None else bias.detach().float())
    return lambda inputs: torch.ops.quantized.linear_dynamic(inputs, packed, True)


class Int8Linear(nn.Linear):
    """A linear layer that computes in 8-bit integers; its weights stay beside it, and are not trained through it.

    Args:
        linear: The layer that it stands for.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self._product = int8_linear(linear.weight, linear.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Shape (..., in) -> (..., out)."""
        return self._product(input)


def quantize_linears(model: nn.Module, left_out: nn.Module) -> None:
    """Let all linear layers of a model on a CPU but one compute in 8-bit integers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and child is not left_out:
                made: Any = Int8Linear(child)
                setattr(parent, name, made)
