"""The output projection of a decoding step, its weights laid out once for many small products."""

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_knnmt.backbone.int8 import int8_linear
from lightning_knnmt.backbone.keyed_model import KeyedModel

_ROWS = 128  # for which oneDNN lays the weights out; other numbers of rows take the same layout


class Projection:
    """Logits (R, V) of decoder outputs (R, D): what `KeyedModel.project` gives, up to rounding.

    On a CPU, float32 weights are laid out once as oneDNN likes them, which makes the product of few rows with a whole
    vocabulary up to twice as fast as `F.linear`, whose layout begins anew at each step. It takes as much memory again.
    With `quantization: int8` the product is one of 8-bit integers.

    Args:
        model: The model.
    """

    def __init__(self, model: KeyedModel) -> None:
        self._model = model
        self._laid_out: Callable[[Tensor], Tensor] | None = None
        self._of: tuple[int, ...] = ()  # the weights that were laid out

    def __call__(self, outputs: Tensor) -> Tensor:
        """Logits of R rows."""
        weights = self._model.projection_weights()
        if weights is None or outputs.device.type != "cpu" or outputs.dtype != torch.float32:
            return self._model.project(outputs)
        of = tuple(part for tensor in weights if tensor is not None for part in (tensor.data_ptr(), _version(tensor)))
        if self._laid_out is None or self._of != of:  # training changes weights
            self._laid_out, self._of = self._lay_out(*weights), of
        return self._laid_out(outputs)

    def _lay_out(self, weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
        if self._model.config.quantization == "int8":
            return int8_linear(weight, bias)
        if not torch.backends.mkldnn.is_available():
            return self._model.project
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), _ROWS)
        return lambda outputs: torch.ops.mkldnn._linear_pointwise(outputs, packed, bias, "none", [], "")


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version
