"""What is advised, in which order."""

from types import SimpleNamespace

import pytest

from perception_r1.planning.advice import next_change
from perception_r1.planning.devices import Devices
from perception_r1.policy.load import LoraConfig, PolicyConfig


def advised(phase, devices=None, **policy):
    """The changes that are advised one after another, without their values being taken up."""
    module = SimpleNamespace(
        policy_config=PolicyConfig(**policy), max_new_tokens=50, micro_batch_tokens=None, eval_batch_tokens=150
    )
    plan = SimpleNamespace(
        highest=SimpleNamespace(phase=phase), prompt=SimpleNamespace(num_tokens=100), devices=devices or Devices()
    )
    return next_change(module, plan)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"phase": "backward"}, ["--model.policy.gradient_checkpointing", "true"]),
        ({"phase": "backward", "gradient_checkpointing": True}, ["--model.micro_batch_tokens", "1200"]),
        ({"phase": "evaluate"}, ["--variant", "lora"]),  # an evaluation is of one prompt already
        ({"phase": "decode"}, ["--variant", "lora"]),
        ({"phase": "decode", "devices": Devices(count=2)}, ["--trainer.strategy", "zero1"]),
        ({"phase": "decode", "devices": Devices(count=2, strategy="zero1")}, ["--trainer.strategy", "fsdp2"]),
        ({"phase": "decode", "devices": Devices(count=2, strategy="fsdp2")}, ["--variant", "lora"]),
        ({"phase": "decode", "lora": LoraConfig()}, ["--model.policy.gradient_checkpointing", "true"]),
        ({"phase": "decode", "lora": LoraConfig(), "gradient_checkpointing": True}, None),
    ],
    ids=str,
)
def test_what_changes_no_number_comes_first_and_an_adapter_last(change, found):
    assert advised(**change) == found
