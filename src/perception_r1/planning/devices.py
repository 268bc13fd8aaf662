"""What several devices divide among themselves, and what they gather for a while, in a plan of one of them."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, TypeAlias
from unittest import mock

import torch
from torch import Tensor

from perception_r1.planning.meter import MemoryMeter
from perception_r1.policy.policy import Policy

Strategy: TypeAlias = Literal["ddp", "zero1", "fsdp2"]

_DIVIDED: dict[Strategy, tuple[str, ...]] = {
    "ddp": (),
    "zero1": ("moments",),
    "fsdp2": ("weights", "reference", "gradients", "moments"),
}
"""Kinds of memory of which a device has its share only."""
_GATHERED = "gathered"
_NUM_BLOCKS = 2
"""Blocks that are whole at once: one is computed, the next is gathered, or the last one's gradients are divided."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Devices:
    """The devices of a run.

    Attributes:
        count: How many train together.
        strategy: See `modules/strategies.py`; of one device without meaning.
        is_bucket_view: Gradients lie in the buckets in which devices exchange them.
    """

    count: int = 1
    strategy: Strategy = "ddp"
    is_bucket_view: bool = False

    @property
    def shares(self) -> dict[str, float]:
        """What a device has of kinds that are divided."""
        return dict.fromkeys(_DIVIDED[self.strategy], 1 / self.count)

    @property
    def has_buckets(self) -> bool:
        """Gradients are exchanged in buckets, which are as large as they."""
        return self.count > 1 and not self.is_sharded

    @property
    def is_sharded(self) -> bool:
        """Weights are divided."""
        return self.strategy == "fsdp2"


@contextmanager
def gather_wholes(meter: MemoryMeter) -> Iterator[None]:
    """Where a run gathers the whole weights of a policy, they are held beside its share."""

    @contextmanager
    def unsharded(policy: Policy) -> Iterator[None]:
        whole = _hold(num_bytes(policy.parameters()))
        meter.claim([whole], _GATHERED)
        yield
        policy.release_graphs()

    with ExitStack() as stack:
        for module in ("evaluation", "grpo"):
            stack.enter_context(mock.patch(f"perception_r1.modules.{module}.unsharded", unsharded))
        yield


@contextmanager
def gather_for_pass(meter: MemoryMeter, policy: Policy, *, is_backward: bool) -> Iterator[None]:
    """What a pass of training holds whole: all that is outside of blocks, and the blocks whose turn it is."""
    model = policy.model
    blocks = [*policy.family.vision_blocks(model), *model.model.language_model.layers]
    inside = {id(weight) for block in blocks for weight in block.parameters()}
    outside = [weight for weight in policy.parameters() if id(weight) not in inside]
    largest = max(blocks, key=lambda block: num_bytes(block.parameters()))
    weights = [*outside, *_NUM_BLOCKS * [*largest.parameters()]]
    trained = [weight for weight in weights if weight.requires_grad and is_backward]
    held = _hold(num_bytes(weights) + num_bytes(trained))
    meter.claim([held], _GATHERED)
    yield


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Of tensors together."""
    return sum(tensor.nbytes for tensor in tensors)


def _hold(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device="meta")
