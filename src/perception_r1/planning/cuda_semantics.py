"""Tensors without values compute as those on CUDA would: the same kernels, types and temporary buffers.

On the meta device torch takes the plainest way to every result: attention with all its scores, optimisers weight by
weight, no mixed precision. What a card would hold is something else, and is said here.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import _engine_run_backward
from torch.overrides import TorchFunctionMode
from torch.utils._foreach_utils import _get_foreach_kernels_supported_devices, _get_fused_kernels_supported_devices
from torch.utils.checkpoint import DefaultDeviceType

LOWER_PRECISION = {"matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "baddbmm", "einsum", "linear"}
LOWER_PRECISION |= {"conv1d", "conv2d", "conv3d", "scaled_dot_product_attention"}
FLOAT32 = {"__pow__", "pow", "rsqrt", "reciprocal", "exp", "log", "softplus", "layer_norm", "group_norm", "norm"}
FLOAT32 |= {"softmax", "log_softmax", "logsumexp", "sum", "prod", "cumsum", "cumprod"}
"""What automatic mixed precision on CUDA computes in the lower type, and what in float32, by the names of torch."""
_CAST = (torch.float32, torch.bfloat16, torch.float16)
_ALIGNMENT = 16
"""Columns to whose multiples the kernels want a mask filled up."""


@contextmanager
def cuda_semantics(autocast_dtype: torch.dtype | None) -> Iterator[None]:
    """Tensors on the meta device compute as on CUDA; with a type, under automatic mixed precision."""
    was_enabled, was_dtype = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    was_default = DefaultDeviceType.get_device_type()
    foreach = [*_get_foreach_kernels_supported_devices(), "meta"]
    fused = [*_get_fused_kernels_supported_devices(), "meta"]
    with ExitStack() as stack:
        for name, devices in {"foreach": foreach, "fused": fused}.items():
            patched = f"torch.optim.optimizer._get_{name}_kernels_supported_devices"
            stack.enter_context(mock.patch(patched, lambda devices=devices: list(devices)))
        stack.enter_context(functions(_CudaFunctions))
        torch.set_autocast_enabled("cuda", autocast_dtype is not None)
        torch.set_autocast_dtype("cuda", autocast_dtype or was_dtype)
        DefaultDeviceType.set_device_type("cpu")  # of checkpointing: it would ask the device for its random state
        try:
            yield
        finally:
            DefaultDeviceType.set_device_type(was_default)
            torch.set_autocast_dtype("cuda", was_dtype)
            torch.set_autocast_enabled("cuda", was_enabled)


@contextmanager
def functions(mode: Callable[[], TorchFunctionMode]) -> Iterator[None]:
    """A mode, also within backward passes: calls of torch's own switch it off, but checkpointed layers run there."""

    def run_backward(*args: Any, **kwargs: Any) -> Any:
        with mode():
            return _engine_run_backward(*args, **kwargs)

    with mock.patch("torch.autograd._engine_run_backward", run_backward), mode():
        yield


class _CudaFunctions(TorchFunctionMode):
    """Mixed precision and attention kernels of CUDA for tensors on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if torch.is_autocast_enabled("cuda"):
            args, kwargs = _cast(getattr(func, "__name__", ""), args, kwargs)
        if func is F.scaled_dot_product_attention and args[0].is_meta:
            return _attend(*args, **kwargs)
        return func(*args, **kwargs)


def _cast(name: str, args: Any, kwargs: Any) -> Any:
    """The arguments of a function as automatic mixed precision hands them on."""
    if name in LOWER_PRECISION:
        dtype = torch.get_autocast_dtype("cuda")
    elif name in FLOAT32 and kwargs.get("dtype") is None:
        dtype = torch.float32
    else:
        return args, kwargs

    def cast(value: Any) -> Any:
        is_eligible = isinstance(value, Tensor) and value.is_meta and value.dtype in _CAST
        return value.to(dtype) if is_eligible and value.dtype != dtype else value

    return tuple(map(cast, args)), {key: cast(value) for key, value in kwargs.items()}


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """SDPA by the kernel that CUDA would choose: flash, then memory-efficient, then plain."""
    is_grouped = query.shape[1] != key.shape[1]
    needs_gradient = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    is_flash = attn_mask is None and query.dtype in (torch.bfloat16, torch.float16)
    aten: Any = torch.ops.aten
    if not is_flash and (is_grouped or query.dtype == torch.float64):
        plain = aten._scaled_dot_product_attention_math
        return plain(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=is_grouped)[0]  # type: ignore[no-any-return]
    bias = None if attn_mask is None else _bias(attn_mask, query, key)
    if not needs_gradient:  # what the kernels hold then is their result, and one number per row that they drop
        batch, heads, length, size = query.shape
        torch.empty(batch, heads, length, device="meta")
        return torch.empty(batch, length, heads, size, dtype=query.dtype, device="meta").transpose(1, 2)
    if is_flash:
        return aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, False, scale=scale)[0]  # type: ignore[no-any-return]
    efficient = aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]  # type: ignore[no-any-return]


def _bias(mask: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """A mask as the kernel takes it: added to the scores, its rows aligned, the same for all rows of the batch."""
    width = -(-key.shape[2] // _ALIGNMENT) * _ALIGNMENT
    bias = query.new_empty(*mask.shape[:-1], width)[..., : key.shape[2]]
    return bias.expand(*query.shape[:2], query.shape[2], key.shape[2])
