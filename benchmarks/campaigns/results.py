"""What comes of a command, as texts by name: two runs are the same where these are, and the names tell what is not."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeAlias

import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from perception_r1.policy.checkpoint_file import load_file

Result: TypeAlias = dict[str, str]

_CHECKPOINT = ("state_dict", "optimizer_states", "lr_schedulers", "callbacks", "global_step", "epoch")
"""Parts of a checkpoint that an interruption must not change; others hold seconds."""
_CARD = ("status", "steps", "num_skipped_steps", "before", "after", "margins_of_error")
"""The same of run.json."""
_OF_THE_MACHINE = ("second", "memory")
"""Words in the tags of metrics that no two runs have alike."""


def digest(data: bytes) -> str:
    """A short name for bytes."""
    return sha256(data).hexdigest()[:16]


def is_draft(path: Path) -> bool:
    """Whether the name of a file, or of its folder, says that it is not whole yet, or in use."""
    return any(part.endswith((".tmp", ".part", ".lock")) for part in path.parts)


def files(folder: Path, pattern: str = "**/*") -> Result:
    """Files by their path from a folder, with what is in them."""
    found = sorted(path for path in folder.glob(pattern) if path.is_file() and not is_draft(path))
    return {path.relative_to(folder).as_posix(): digest(path.read_bytes()) for path in found}


def training(runs: Path) -> Result:
    """The newest of several runs: weights bit by bit, state of the optimiser, metrics, logs and pictures."""
    folder = max(runs.glob("version_*"), key=lambda path: int(path.name.rpartition("_")[2]))
    found: Result = {}
    for name in ("last", "best"):
        checkpoint = load_file(folder / "checkpoints" / f"{name}.ckpt")
        chosen = {key: checkpoint[key] for key in _CHECKPOINT if key in checkpoint}
        found |= {f"{name}.ckpt/{key}": value for key, value in flat(chosen).items()}
    card = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    found |= {f"run.json/{key}": value for key, value in flat({key: card[key] for key in _CARD}).items()}
    return found | logged(folder) | files(folder, "samples/**/*.png")


def logged(folder: Path) -> Result:
    """The metrics and pictures that TensorBoard shows, with their steps, but for what tells of the machine."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=True)
    tags = events.Reload().Tags()
    computed = (tag for tag in tags["scalars"] if not any(word in tag for word in _OF_THE_MACHINE))
    scalars = {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in computed}
    images = {
        tag: [(e.step, digest(e.encoded_image_string)) for e in events.Images(tag)]
        for tag in tags["images"]  # one of each step
    }
    return {f"TensorBoard/{tag}": repr(sorted(values)) for tag, values in (scalars | images).items()}


def flat(value: Any, name: str = "") -> Result:
    """Nested values by their path, tensors as digests of their bytes."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(index), item) for index, item in enumerate(value)]
    elif isinstance(value, torch.Tensor):
        data = value.detach().cpu().contiguous().view(torch.uint8) if value.dim() else value.detach().cpu()
        return {name: f"{value.dtype} {tuple(value.shape)} {digest(data.numpy().tobytes())}"}
    else:
        return {name: repr(value)}
    return {path: text for key, item in items for path, text in flat(item, f"{name}/{key}".lstrip("/")).items()}


def differences(result: Mapping[str, str], reference: Mapping[str, str]) -> list[str]:
    """The names of what is not the same."""
    return [name for name in sorted({*result, *reference}) if result.get(name) != reference.get(name)]
