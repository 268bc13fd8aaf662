"""The machine and the code that a run depends on, as plain data."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from perception_r1.callbacks.files import Json

_PACKAGES = ("torch", "lightning", "transformers", "peft", "torchmetrics", "numpy", "perception_r1")
_GIT_SECONDS = 10
"""A repository on a slow disk must not hold a run up."""


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide what a run computes; None for one not installed."""
    return {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES}


def git_state(folder: Path) -> dict[str, Json] | None:
    """Commit and dirtiness of the repository that holds a folder; None when there is none, or no git."""
    try:
        return {"commit": _git(folder, "rev-parse", "HEAD"), "is_dirty": bool(_git(folder, "status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


def hardware() -> dict[str, Json]:
    """CPU, memory in GiB and GPUs of this machine; None for what is not known."""
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": _memory_gib(),
        "gpus": [{"name": gpu.name, "memory_gib": round(gpu.total_memory / 2**30, 1)} for gpu in properties],
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=_GIT_SECONDS, check=True)
    return done.stdout.strip()


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.exists() else ""
    found = re.search(r"^model name\s*:\s*(.*\S)", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        num_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):  # not POSIX, or a system that does not say
        return None
    return round(num_bytes / 2**30, 1)
