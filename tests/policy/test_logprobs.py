from dataclasses import replace

import pytest
import torch

from perception_r1.policy.forward import pack_prompts
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.policy import Policy
from tests.policy import oracle

LENGTHS = [3, 7, 1, 5, 4, 2, 6, 6, 1]
"""Three completions of each of three prompts, some of a single token."""


def naive_logprobs(plain, policy, completions, temperature, places=(0, 1, 2)):
    """A plain forward of each row alone."""
    group_size = len(completions) // len(places)
    rows = []
    for index, completion in enumerate(completions):
        prompt = oracle.encode(policy.processor, [places[index // group_size]])
        rows.append(oracle.logprobs(plain, prompt, completion, policy.banned, temperature))
    return rows


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_they_equal_a_plain_forward_of_each_row(policy, plain, exact_layers, temperature):
    completions = oracle.random_completions(LENGTHS)
    with torch.no_grad():
        logprobs = policy(oracle.encode(policy.processor), completions, temperature)
        naive = naive_logprobs(plain, policy, completions, temperature)
    assert logprobs.shape == (len(LENGTHS), max(LENGTHS))
    for row, expected, length in zip(logprobs, naive, LENGTHS, strict=True):
        torch.testing.assert_close(row[:length], expected, rtol=0, atol=1e-12)
        assert torch.equal(row[length:], torch.zeros(max(LENGTHS) - length, dtype=torch.float64))


def test_all_gradients_equal_those_of_plain_forwards(policy, plain, exact_layers):
    completions = oracle.random_completions(LENGTHS)
    weights = torch.linspace(-1, 1, sum(LENGTHS), dtype=torch.float64)
    logprobs = policy(oracle.encode(policy.processor), completions, 0.8)
    is_token = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    (logprobs[is_token] * weights).sum().backward()
    (torch.cat(naive_logprobs(plain, policy, completions, 0.8)) * weights).sum().backward()
    expected = dict(plain.named_parameters())
    num_compared = 0
    for name, parameter in policy.network.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
            continue
        scale = float(expected[name].grad.abs().max())
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=0, atol=1e-9 * max(scale, 1e-6), msg=name)
        num_compared += 1
    assert num_compared > 60
    assert any(
        ".visual." in name and parameter.grad.abs().max() > 0 for name, parameter in policy.network.named_parameters()
    )


@pytest.mark.parametrize("lengths", [[1, 1], [1, 4], [4, 1]])
def test_completions_of_one_token_are_fine(policy, plain, exact_layers, lengths):
    completions = oracle.random_completions(lengths)
    with torch.no_grad():
        logprobs = policy(oracle.encode(policy.processor, [1]), completions)
        naive = naive_logprobs(plain, policy, completions, 1.0, places=[1])
    for row, expected in zip(logprobs, naive, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-12)


def test_probabilities_of_all_tokens_that_may_be_written_add_up_to_one(policy):
    prompt = oracle.encode(policy.processor, [0])
    size = policy.model.config.text_config.vocab_size
    with torch.no_grad():
        logprobs = policy(prompt, [torch.tensor([token]) for token in range(size)], 0.9)[:, 0]
    assert float(logprobs.exp().sum()) == pytest.approx(1.0)
    assert (logprobs == float("-inf")).nonzero()[:, 0].tolist() == policy.banned.tolist()


def test_the_comparison_would_notice_positions_that_are_off_by_one(policy, plain, exact_layers, monkeypatch):
    def shifted(model, prompts):
        embedded = pack_prompts(model, prompts)
        return replace(embedded, next_position=embedded.next_position + 1)

    monkeypatch.setattr("perception_r1.policy.logprobs.pack_prompts", shifted)
    completion = oracle.random_completions([5])
    with torch.no_grad():
        logprobs = policy(oracle.encode(policy.processor, [0]), completion)[0]
        naive = naive_logprobs(plain, policy, completion, 1.0, places=[0])[0]
    assert float((logprobs[1:] - naive[1:]).abs().min()) > 1e-6


def test_a_row_does_not_depend_on_its_neighbours(policy):
    completions = oracle.random_completions(LENGTHS)
    with torch.no_grad():
        together = policy(oracle.encode(policy.processor), completions)
        alone = policy(oracle.encode(policy.processor, [1]), completions[4:5])
    torch.testing.assert_close(together[4, : LENGTHS[4]], alone[0], rtol=0, atol=1e-6)


def test_completions_must_fit_the_prompts(policy):
    with pytest.raises(ValueError, match="4 completions cannot be divided evenly among 3 prompts"):
        policy(oracle.encode(policy.processor), oracle.random_completions([1, 2, 3, 4]))


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=2)])
def test_gradient_checkpointing_changes_no_gradient(grouped_folders, family, lora):
    def gradients(is_checkpointed):
        torch.manual_seed(0)
        config = PolicyConfig(name=str(grouped_folders[family]), lora=lora, gradient_checkpointing=is_checkpointed)
        policy = Policy.load(config).double().train()
        policy(oracle.encode(policy.processor, [0, 2]), oracle.random_completions([3, 5, 2, 4])).sum().backward()
        return {name: parameter.grad for name, parameter in policy.named_parameters() if parameter.grad is not None}

    plain, checkpointed = gradients(False), gradients(True)
    assert plain.keys() == checkpointed.keys() != set()
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-9, atol=1e-12, msg=name)


def test_many_rows_of_logits_are_computed_in_chunks_with_the_same_result(policy, monkeypatch):
    def run():
        policy.zero_grad()
        logprobs = policy(oracle.encode(policy.processor), oracle.random_completions(LENGTHS))
        logprobs.sum().backward()
        return logprobs.detach(), policy.model.lm_head.weight.grad.clone()

    whole = run()
    monkeypatch.setattr("perception_r1.policy.logprobs._HEAD_ROWS", 4)
    for one, other in zip(run(), whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)
