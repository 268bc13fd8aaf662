"""GRPO's update on the meta device, where reading a value raises: it waits for the device once, behind all passes."""

from contextlib import nullcontext
from typing import get_args

import pytest
import torch

from perception_r1.grpo.loss import SamplerCorrection
from perception_r1.modules import GRPO
from perception_r1.modules.experience import Experience
from perception_r1.policy.packing import plan_micro_batches
from perception_r1.policy.policy import Policy
from tests.modules.toy import make_module
from tests.policy import oracle

LENGTHS = [3, 7, 1, 5]


@pytest.fixture
def passes(monkeypatch):
    """A list that grows with every backward pass; what a trainer does around it is left out."""
    passes = []
    monkeypatch.setattr(GRPO, "accumulation", lambda self, is_last: nullcontext())
    monkeypatch.setattr(GRPO, "exchanges_gradients", lambda self: False)
    monkeypatch.setattr(GRPO, "manual_backward", lambda self, loss: passes.append(loss.backward()))
    return passes


def update(folder, budget, **options):
    module = make_module(folder, **options)
    module.policy = Policy.load(module.policy_config)
    module.to("meta")
    prompts = module.policy.encode([oracle.chat("a"), oracle.chat("bb")], [[oracle.noise(56, 56)]] * 2)
    experience = Experience(
        prompts=prompts,
        completions=oracle.random_completions(LENGTHS),
        advantages=torch.zeros((4, max(LENGTHS)) if "credit_assignment" in options else 4, device="meta"),
        weights=torch.zeros(4, device="meta"),
        sampled_logprobs=[torch.zeros(length, device="meta") for length in LENGTHS],
        micro_batches=plan_micro_batches(prompts.lengths, LENGTHS, [0, 1], budget),
    )
    with pytest.raises(NotImplementedError, match="meta tensor"):  # the sums for the log
        module.update(experience, module.reference_logprobs(experience))


@pytest.fixture(autouse=True)
def _policy_is_its_own_reference(monkeypatch):
    """The weights do not matter here."""
    monkeypatch.setattr(Policy, "without_adapter", lambda self: nullcontext(self))


@pytest.mark.parametrize(("budget", "num_passes"), [(None, 1), (1, 6)], ids=["whole", "split"])
def test_an_update_reads_nothing_back_before_its_last_pass(folder, passes, budget, num_passes):
    """Two groups in four parts, each of which goes backward by itself, and so does each prompt."""
    update(folder, budget)
    assert len(passes) == num_passes


def test_nor_does_it_where_devices_exchange_gradients(folder, passes, monkeypatch):
    """Then a prompt goes backward with the last part."""
    monkeypatch.setattr(GRPO, "exchanges_gradients", lambda self: True)
    update(folder, 1)
    assert len(passes) == 4


OPTIONS = [
    {"top_p": 0.5},
    {"objective": "cispo"},
    {"objective": "sapo"},
    {"importance_sampling_level": "sequence"},
    {"credit_assignment": "box"},
    *({"sampler_correction": name} for name in get_args(SamplerCorrection)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_nor_does_any_other_objective(folder, passes, options):
    update(folder, 1, **options)
    assert len(passes) == 6


def test_a_reading_per_micro_batch_is_noticed(folder, passes, monkeypatch):
    monkeypatch.setattr(GRPO, "manual_backward", lambda self, loss: passes.append(loss.backward()) or loss.item())
    with pytest.raises(RuntimeError, match="meta"):
        update(folder, 1)
    assert len(passes) == 1
