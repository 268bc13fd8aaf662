"""What a checkpoint holds of a model, and how strictly it is taken up: the same for training and for use."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException

from perception_r1.errors import UserError
from perception_r1.policy.sharded_checkpoint import is_sharded, load_shards


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
    if "run" not in checkpoint:
        raise UserError("The checkpoint was not written by a run of this program; give its last.ckpt or best.ckpt.")


def restore(policy: nn.Module, path: Path) -> int:
    """Give a policy, loaded with the configuration of a run, the weights of the run's checkpoint.

    Returns:
        The optimiser step at which it was written.

    Raises:
        UserError: The file is no checkpoint of ours, or does not fit the policy.
    """
    try:
        if is_sharded(path):
            checkpoint = load_shards(path, parts=["state_dict"])
        else:
            checkpoint = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, CheckpointException) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"The checkpoint {path} cannot be read: {reason}") from error
    check_origin(checkpoint)
    holder = nn.ModuleDict({"policy": policy})  # its entries have the names that they have in a training module
    state: dict[str, Tensor] = checkpoint["state_dict"]
    check_entries(trained_entries(holder, holder.state_dict()), state)
    if {value.dtype for value in state.values()} == {torch.bfloat16}:
        policy.to(torch.bfloat16)  # trained so by trainer.precision bf16-true, whatever the model was read in
    holder.load_state_dict(state, strict=False)
    return cast(int, checkpoint["global_step"])
