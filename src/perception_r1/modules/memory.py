"""The most memory that training has held so far."""

import resource
import sys

import torch

_RSS_UNIT = 1 if sys.platform == "darwin" else 1024
"""Bytes; macOS counts in these, Linux in KiB."""


def peak_memory_gb(device: torch.device) -> float:
    """10^9 bytes held at once: by the allocator of a GPU, of its card, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _RSS_UNIT / 1e9
