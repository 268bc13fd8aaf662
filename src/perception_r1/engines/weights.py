"""The weights of a policy as other engines read them: by the names and in the layout of the hub's files."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from perception_r1.policy.policy import Policy


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of a policy without adapter, which are whole on this device; a tied weight comes once."""
    tensors = {name: parameter.detach() for name, parameter in policy.model.named_parameters()}
    yield from revert_weight_conversion(policy.model, tensors).items()


def save_weights(policy: Policy, folder: Path) -> None:
    """Write the weights of a policy without adapter as `model.safetensors`."""
    save_file({name: tensor.contiguous() for name, tensor in named_weights(policy)}, folder / "model.safetensors")


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write a policy's adapter in the layout of peft."""
    cast(Any, policy.network).save_pretrained(folder)
