"""A policy whose weights are sharded over devices, by torch's `fully_shard` (FSDP2).

Every block of the network is gathered for its own passes only, and its gradients are sharded again at once. So all
devices take part in every pass of training, in the same order. Decoding does not go pass by pass: its number of steps
and of rollouts is each device's own. For that, and for every other pass without gradients, `unsharded` gathers the
whole network once, and no pass inside communicates.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from perception_r1.policy.policy import Policy


def shard(policy: Policy, mesh: DeviceMesh) -> None:
    """Shard the weights of a policy over the devices of a mesh, block by block.

    Embedding, vocabulary head, which may be one tensor, and the rest outside of blocks are gathered together for a
    whole pass.
    """
    model = policy.model
    for block in (*policy.family.vision_blocks(model), *model.model.language_model.layers):
        fully_shard(block, mesh=mesh)
    fully_shard(policy, mesh=mesh)
    policy.register_forward_pre_hook(_wrap, prepend=True)  # before those of fully_shard
    policy.register_forward_pre_hook(_unwrap)
    for name in ("prefill", "encode_images"):  # whichever comes first makes the policy the root of its blocks
        register_fsdp_forward_method(policy, name)


@contextmanager
def unsharded(policy: Policy) -> Iterator[None]:
    """The whole weights on every device for a while; all devices enter together. Nothing happens to a whole policy."""
    parts: list[Any] = [part for part in policy.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.set_reshard_after_forward(part is not policy, recurse=False)  # the root waits for its backward pass
            part.reshard()
        if parts:
            policy.release_graphs()


def total_grad_norm(parameters: list[nn.Parameter]) -> Tensor:
    """Norm of all gradients together, of all their shards if they are sharded; a scalar."""
    norm = torch.nn.utils.get_total_norm([each.grad for each in parameters if each.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


class _Wrapped:
    """An argument in which `fully_shard` sees no tensor: it would move completions to the device, and they stay."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _wrap(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(_Wrapped(value) for value in args)


def _unwrap(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(wrapped.value for wrapped in args)
