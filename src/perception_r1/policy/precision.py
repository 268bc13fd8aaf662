"""In which types values are computed and kept."""

import torch


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type in which values are kept that half precision would spoil: fp32, or fp64 where the model has it."""
    return torch.promote_types(torch.float32, dtype)


def autocast_device(device: torch.device) -> str:
    """Whose mixed precision holds there; on the meta device, where memory is planned, that of CUDA."""
    return "cuda" if device.type == "meta" else device.type
