"""The weights of a policy as other engines read them: by the names and in the layout of the hub's files."""

from collections.abc import Iterator
from pathlib import Path
from typing import cast

from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from perception_r1.policy.families import family_of
from perception_r1.policy.policy import Policy


def named_weights(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Those of a policy without adapter, which are whole on this device; see `Family.named_weights`."""
    return family_of(policy.model).named_weights(policy.model)


def save_weights(policy: Policy, folder: Path) -> None:
    """Write the weights of a policy without adapter as `model.safetensors`."""
    save_file({name: tensor.contiguous() for name, tensor in named_weights(policy)}, folder / "model.safetensors")


def share_weights(folder: Path) -> None:
    """Let others read the weights in a folder as they may read its other files; safetensors keeps them to oneself."""
    for file in folder.glob("*.safetensors"):
        file.chmod(folder.stat().st_mode & 0o666)


def save_adapter(policy: Policy, folder: Path) -> None:
    """Write a policy's adapter, which is whole on this device, in the layout of peft.

    `save_pretrained` asks for a state dict, for which sharded weights would be scattered again.
    """
    network = cast(PeftModel, policy.network)
    weights = get_peft_model_state_dict(network, dict(network.named_parameters()), save_embedding_layers=False)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, folder / "adapter_model.safetensors")
    network.peft_config["default"].save_pretrained(str(folder))
