"""A checkpoint as a folder of shards: every device writes and reads its part, with torch.distributed.checkpoint.

The tensors of weights and of optimiser states are shards, each named by its place in the checkpoint, such as
`state_dict/NAME` or `optimizer_states/0/state/7/exp_avg`. All else is in one file beside them.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

META = "meta.pt"
"""The file with all that is not sharded; Lightning's own name for it."""
_SHARDED = ("state_dict", "optimizer_states")


def is_sharded(path: Path) -> bool:
    """Whether a checkpoint is a folder of shards."""
    return (path / META).is_file()


def save_shards(checkpoint: Mapping[str, Any], folder: Path, *, is_global_zero: bool) -> None:
    """Write a checkpoint; all devices take part, and one of them writes what is not sharded."""
    tensors: dict[str, Tensor] = {}
    rest = {key: _without(value, key, tensors) if key in _SHARDED else value for key, value in checkpoint.items()}
    save(tensors, checkpoint_id=folder)
    if is_global_zero:
        torch.save(rest, folder / META)


def load_shards(
    folder: Path, layouts: Mapping[str, Tensor] | None = None, *, parts: Sequence[str] = _SHARDED
) -> dict[str, Any]:
    """Read a checkpoint, whatever the number of devices that wrote it.

    Args:
        folder: Where it is.
        layouts: Tensors by their place in the checkpoint; those of the optimiser's states by that of their parameter.
            What is read is sharded as these are; all else is whole. All devices of a sharded tensor take part.
        parts: Of what is sharded, what is read; the rest is left out.
    """
    layouts = layouts or {}
    entries: dict[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {}
    for name, entry in entries.items():
        if not name.startswith(tuple(f"{part}/" for part in parts)):
            continue
        layout = layouts.get(name, layouts.get(name.rpartition("/")[0]))
        size, dtype = entry.size, entry.properties.dtype
        if layout is None or layout.shape != size:
            tensors[name] = torch.empty(size, dtype=dtype)
        else:
            tensors[name] = torch.empty_like(layout.detach(), dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process reads it all: export
        load(tensors, checkpoint_id=folder)
    rest = {key: value for key, value in load_meta(folder).items() if key not in _SHARDED or key in parts}
    return {key: _with(value, key, tensors) if key in parts else value for key, value in rest.items()}


def load_meta(folder: Path) -> dict[str, Any]:
    """What of a checkpoint is not sharded."""
    meta: dict[str, Any] = torch.load(folder / META, map_location="cpu", weights_only=True)
    return meta


def _without(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    """A tree of dictionaries and lists without its tensors, which are collected by their place."""
    if isinstance(tree, Tensor):
        tensors[name] = tree
        return None
    if isinstance(tree, dict):
        return {key: _without(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_without(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
    return tree


def _with(tree: Any, name: str, tensors: Mapping[str, Tensor]) -> Any:
    """The tree with its tensors again."""
    if name in tensors:
        return tensors[name]
    if isinstance(tree, dict):
        return {key: _with(value, f"{name}/{key}", tensors) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_with(value, f"{name}/{index}", tensors) for index, value in enumerate(tree)]
    return tree
