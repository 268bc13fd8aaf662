"""What a checkpoint holds of a model, and how strictly it is taken up: the same for training and for use."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from perception_r1.errors import UserError
from perception_r1.policy.checkpoint_file import load_file, verify_file
from perception_r1.policy.sharded_checkpoint import is_sharded, load_meta, load_shards, verify_shards


def trained_entries(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """What training changes of a module's whole state: all but frozen weights, which the model's folder has."""
    named = module.named_parameters(remove_duplicate=False)  # a tied weight is in the state under each of its names
    frozen = {name for name, parameter in named if not parameter.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def check_entries(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    """Refuse a checkpoint whose entries are not exactly those expected, in name and shape.

    Raises:
        UserError: An entry is missing, unexpected or of another shape.
    """
    missing, unexpected = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
    misshapen = sorted(name for name in expected.keys() & given.keys() if expected[name].shape != given[name].shape)
    for fault, names in (("misses", missing), ("has unexpected", unexpected), ("has other shapes of", misshapen)):
        if names:
            raise UserError(
                f"The checkpoint {fault} {len(names)} entries, first {names[0]}: it was written with another model, "
                "adapter or frozen part."
            )


def check_origin(checkpoint: Mapping[str, Any]) -> None:
    """Refuse, with a `UserError`, a checkpoint that another program has written."""
    state = checkpoint.get("state_dict", {})
    is_ours = (
        isinstance(checkpoint.get("run"), dict)
        and type(checkpoint.get("global_step")) is int
        and isinstance(checkpoint.get("loops", {}), dict)
        and isinstance(state, dict)
        and all(isinstance(value, Tensor) for value in state.values())
    )
    if not is_ours:
        raise UserError("The checkpoint was not written by a run of this program; give its last.ckpt or best.ckpt.")


def is_checkpoint(path: Path) -> bool:
    """Whether there may be a checkpoint: a file, or a folder of shards."""
    return path.is_file() or is_sharded(path)


def verify(path: Path) -> None:
    """Make sure that a checkpoint is what one of our runs has written, byte by byte, before it is used.

    Raises:
        DamagedCheckpointError: It is damaged, or no checkpoint of ours.
        UserError: It cannot be read.
    """
    if is_sharded(path):
        verify_shards(path)
    else:
        verify_file(path)


def read(path: Path) -> dict[str, Any]:
    """A whole checkpoint; raises as `verify` does."""
    return load_shards(path) if is_sharded(path) else load_file(path)


def read_meta(path: Path) -> dict[str, Any]:
    """A checkpoint of which tensors are not read; raises as `verify` does."""
    return load_meta(path) if is_sharded(path) else load_file(path, is_mapped=True)


def restore(policy: nn.Module, path: Path) -> int:
    """Give a policy, loaded with the configuration of a run, the weights of the run's checkpoint.

    Returns:
        The optimiser step at which it was written.

    Raises:
        UserError: The file is damaged or no checkpoint of ours, or does not fit the policy.
    """
    checkpoint = load_shards(path, parts=["state_dict"]) if is_sharded(path) else load_file(path, is_mapped=True)
    check_origin(checkpoint)
    holder = nn.ModuleDict({"policy": policy})  # its entries have the names that they have in a training module
    state: dict[str, Tensor] = checkpoint.get("state_dict", {})
    check_entries(trained_entries(holder, holder.state_dict()), state)
    if {value.dtype for value in state.values()} == {torch.bfloat16}:
        policy.to(torch.bfloat16)  # trained so by trainer.precision bf16-true, whatever the model was read in
    holder.load_state_dict(state, strict=False)
    return cast(int, checkpoint["global_step"])
