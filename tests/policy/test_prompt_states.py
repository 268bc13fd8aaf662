"""Prompts that are computed before their completions: the numbers and gradients of one pass, in any selection."""

import pytest
import torch

from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle

INDICES = (2, 0, 1, 3, 4)
"""Prompts of three lengths, not in order, one of them with two images."""
LENGTHS = [3, 7, 1, 5, 4, 2, 6, 6, 2, 1]
"""Two completions of each."""


@pytest.fixture
def trained(grouped_folders, family):
    policy = Policy.load(PolicyConfig(name=str(grouped_folders[family]))).double().eval()
    oracle.shake(policy.network)
    return policy


def passes(policy, numbers, *, is_known):
    """Log-probabilities of the completions of some prompts, and gradients of a loss that weighs each differently."""
    prompts, completions = oracle.encode(policy.processor, INDICES), oracle.random_completions(LENGTHS)
    rows = [completions[2 * number + row] for number in numbers for row in (0, 1)]
    states = policy.prompt_states(prompts).select(numbers) if is_known else None
    logprobs = policy(prompts.select(numbers), rows, 0.7, 1.0, states)
    policy.network.zero_grad()
    (torch.linspace(-1, 1, logprobs.numel(), dtype=torch.float64).view(logprobs.shape) * logprobs).sum().backward()
    gradients = {name: value.grad for name, value in policy.network.named_parameters() if value.grad is not None}
    return logprobs.detach(), {name: gradient.clone() for name, gradient in gradients.items()}


@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [3, 0, 4], [1]], ids=["all", "some", "one"])
def test_completions_behind_known_prompts_are_those_of_one_pass(trained, numbers):
    expected, gradients = passes(trained, numbers, is_known=False)
    found, others = passes(trained, numbers, is_known=True)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1e-6, float(gradient.abs().max()))
        assert float((others[name] - gradient).abs().max()) / scale < 1e-5, name  # float32 inside transformers


def test_decoding_reads_known_prompts_as_those_that_it_computes(trained):
    prompts = oracle.encode(trained.processor, INDICES)
    states = trained.prompt_states(prompts)
    assert states.hidden.requires_grad
    params = trained.sampling_params(max_new_tokens=5, temperature=1.0)
    found, expected = (
        trained.generate(cache, group_size=3, params=params, seeds=range(len(INDICES)))
        for cache in (trained.prefill(prompts, states), trained.prefill(prompts))
    )
    assert all(map(torch.equal, found.completions, expected.completions))
    assert not any(logprobs.requires_grad for logprobs in found.logprobs)
    assert states.select(range(len(INDICES))) is states
