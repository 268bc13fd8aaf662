"""Linear layers of the same input as one product, with adapters merged, in the layout that multiplies fastest."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PACKED_WEIGHTS = 2**18
"""Joined weights of at least so many are packed on a CPU: oneDNN multiplies few rows with them up to twice as fast."""


class FusedLinear:
    """Linear layers of the same input as one product.

    Args:
        layers: nn.Linear, or adapters of peft around them.
        dtype: Type in which the joined and merged weights are held; None: the layers are called as they are.
    """

    def __init__(self, layers: Sequence[Any], dtype: torch.dtype | None) -> None:
        self._layers, self._dtype = layers, dtype
        self._weight: Tensor | None = None
        self._packed_weight: Tensor | None = None
        self._bias: Tensor | None = None
        self.sync_weights()

    @torch.no_grad()
    def sync_weights(self) -> None:
        """Copy the weights, in place from the second time on: captured graphs go on reading them."""
        if self._dtype is None:
            return
        weight = _join([_merged_weight(layer) for layer in self._layers], self._dtype)
        biases = [_base(layer).bias for layer in self._layers if _base(layer).bias is not None]
        bias = _join(biases, self._dtype) if biases else None
        if _is_packed(weight):
            self._packed_weight, self._bias = torch.ops.mkldnn._reorder_linear_weight(weight), bias
            return
        if self._weight is None:
            self._weight, self._bias = weight, bias
        elif weight.data_ptr() != self._weight.data_ptr():
            self._weight.copy_(weight)
        if bias is not None and self._bias is not None and bias.data_ptr() != self._bias.data_ptr():
            self._bias.copy_(bias)

    def __call__(self, rows: Tensor) -> Tensor:
        """[..., out] from [..., in]."""
        if self._packed_weight is not None:
            rows = rows.to(self._packed_weight.dtype)
            product: Tensor = torch.ops.mkldnn._linear_pointwise(rows, self._packed_weight, self._bias, "none", [], "")
            return product
        if self._weight is not None:
            return F.linear(rows.to(self._weight.dtype), self._weight, self._bias)
        outputs = [layer(rows) for layer in self._layers]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)


def _is_packed(weight: Tensor) -> bool:
    """Whether a product has its weight in oneDNN's own layout; one on fake tensors, of a plan, has not."""
    is_real = type(weight) in (Tensor, nn.Parameter) and weight.is_cpu
    return is_real and weight.dtype == torch.float32 and weight.numel() >= _PACKED_WEIGHTS and _has_kernels()


@cache
def _has_kernels() -> bool:
    return torch.backends.mkldnn.is_available() and "AVX" in torch.backends.cpu.get_cpu_capability()


def _base(layer: Any) -> Any:
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer


def _merged_weight(layer: Any) -> Tensor:
    """The weight of a linear layer with its active adapters; where there may be one it is a copy, on or off."""
    weight: Tensor = _base(layer).weight
    if not hasattr(layer, "get_delta_weight"):
        return weight
    weight = weight.clone()  # `sync_weights` writes into it
    if not layer.disable_adapters and not layer.merged:
        for name in layer.active_adapters:
            if name in layer.lora_A:
                weight = weight + layer.get_delta_weight(name)
    return weight


def _join(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One tensor after another along the first dimension; a single one of the right type is not copied."""
    return (tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))).to(dtype)
