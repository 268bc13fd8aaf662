"""Linear attention over rows, beside the layer of transformers over each prompt and completion by itself."""

from dataclasses import replace

import pytest
import torch
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from perception_r1.policy import linear_attention
from perception_r1.policy.linear_attention import gates, next_token_linear_attention, shared_prompt_linear_attention
from perception_r1.policy.packing import pack, pack_behind
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import LinearStates, PromptStates
from tests.policy import oracle

CPU, HIDDEN = torch.device("cpu"), 8
BATCHES = [
    ([5], [1]),
    ([1], [1, 1, 4]),
    ([2, 2, 3], [3, 1, 2, 6, 1, 1]),
    ([1, 1, 2, 9, 9], [2, 5, 1, 1, 7, 3, 4, 4, 2, 1]),
    ([70, 130], [66, 1, 2, 129]),
    ([3, 3], []),
]
"""Prompts and completions, of a single token too; the convolution is four tokens wide, and a chunk of the rule 64."""


@pytest.fixture
def net(exact_layers):
    """A layer whose states last, with more heads of values than of keys."""
    torch.manual_seed(0)
    sizes = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 3}
    config = Qwen3_5TextConfig(
        hidden_size=HIDDEN, num_hidden_layers=1, linear_value_head_dim=5, layer_types=["linear_attention"], **sizes
    )
    net = Qwen3_5GatedDeltaNet(config, 0).double()
    for parameter in net.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape)
    net.A_log.data -= 4
    return net


def random_row(lengths, completions):
    """Inputs of prompts and of completions, each by itself; of these the last token is never read."""
    torch.manual_seed(1)
    pieces = [*lengths, *(length - 1 for length in completions)]
    parts = torch.randn(sum(pieces), HIDDEN, dtype=torch.float64).split(pieces)
    return [part.clone().requires_grad_() for part in parts]


def alone(net, parts, lengths, completions):
    """What the layer of transformers makes of each prompt, and of each completion behind its prompt."""
    group_size = len(completions) // len(lengths)
    prompts = [net(part[None])[0] for part in parts[: len(lengths)]]
    behind = []
    for number, part in enumerate(parts[len(lengths) :]):
        prompt = parts[number // group_size]
        behind.append(net(torch.cat([prompt, part])[None])[0, len(prompt) :])
    return torch.cat(prompts + behind)


def gradients(net, parts, found):
    """Of the parts and all weights, for a loss that weighs every number differently."""
    weights = torch.linspace(-1, 1, found.numel(), dtype=found.dtype).view(found.shape)
    return torch.autograd.grad((found * weights).sum(), [*parts, *net.parameters()], allow_unused=True)


@pytest.mark.parametrize(("lengths", "completions"), BATCHES)
def test_a_row_is_each_completion_behind_its_prompt_and_so_are_the_gradients(net, lengths, completions):
    parts = random_row(lengths, completions)
    packing = pack(lengths, completions, CPU)
    found = shared_prompt_linear_attention(net, torch.cat(parts)[None], packing=packing)[0]
    expected = alone(net, parts, lengths, completions)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for gradient, other in zip(gradients(net, parts, found), gradients(net, parts, expected), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 70])
def test_completions_behind_a_prompt_that_is_known_send_their_gradient_through_its_states(net, length):
    completions = [3, 1, 6]
    parts = random_row([length], completions)
    recorded = {}
    first = replace(pack([length], [], CPU), recorded=recorded)
    prompt = shared_prompt_linear_attention(net, parts[0][None], packing=first)[0]
    known = PromptStates(order=[0], lengths=[length], layers=recorded, hidden=torch.empty(1, HIDDEN))
    behind = pack_behind(known, completions, CPU)
    found = shared_prompt_linear_attention(net, torch.cat(parts[1:])[None], packing=behind)[0]
    expected = alone(net, parts, [length], completions)
    torch.testing.assert_close(torch.cat([prompt, found]), expected, rtol=0, atol=1e-12)
    both = gradients(net, parts, torch.cat([prompt, found])), gradients(net, parts, expected)
    for gradient, other in zip(*both, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-9, atol=1e-10)


def test_without_a_packing_the_layer_computes_as_in_transformers(net):
    rows = torch.randn(2, 6, HIDDEN, dtype=torch.float64)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6])
    assert torch.equal(shared_prompt_linear_attention(net, rows, attention_mask=mask), net(rows, attention_mask=mask))


@pytest.mark.parametrize("length", [1, 3, 70])
def test_a_token_more_is_read_as_in_a_longer_row(net, length):
    row = torch.randn(length + 5, HIDDEN, dtype=torch.float64)
    recorded = {}
    packing = replace(pack([length], [], CPU), recorded=recorded)
    shared_prompt_linear_attention(net, row[None, :length], packing=packing)
    ((states,),) = recorded.values()
    states = LinearStates(*(tensor.detach()[:, None].clone() for tensor in states))
    for number in range(length, len(row)):
        token = row[number].view(1, 1, -1)
        decay, rate = gates(net, net.in_proj_a(token), net.in_proj_b(token))
        with torch.no_grad():
            read = next_token_linear_attention(net, states, net.in_proj_qkv(token), decay, rate)[0, 0]
        found = net.out_proj(net.norm(read, net.in_proj_z(token).view_as(read)).flatten())
        expected = net(row[None, : number + 1])[0, -1]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


CHANGES = {
    "nothing of the prompt": lambda states: LinearStates(*map(torch.zeros_like, states)),
    "no inputs of the convolution": lambda states: states._replace(inputs=torch.zeros_like(states.inputs)),
    "the states of another prompt": lambda states: LinearStates(*(tensor.flip(0) for tensor in states)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_comparison_would_notice_completions_that_know(net, monkeypatch, change):
    lengths, completions = [9, 9], [4, 3, 5, 2]
    parts, packing = random_row(lengths, completions), pack(lengths, completions, CPU)
    read_completions = linear_attention._read_completions
    monkeypatch.setattr(
        linear_attention,
        "_read_completions",
        lambda module, states, *rest: read_completions(module, change(states), *rest),
    )
    found = shared_prompt_linear_attention(net, torch.cat(parts)[None], packing=packing)[0]
    expected = alone(net, parts, lengths, completions)
    torch.testing.assert_close(found[:18], expected[:18], rtol=0, atol=1e-12)
    assert float((found - expected).detach()[18:].abs().max()) > 1e-3


@pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)
def test_the_comparison_of_a_whole_model_would_notice_states_without_gradient(
    policy: Policy, exact_layers, monkeypatch
):
    completions = oracle.random_completions([5, 4])
    read_completions = linear_attention._read_completions

    def gradient():
        policy.zero_grad()
        policy(oracle.encode(policy.processor, [0]), completions).sum().backward()
        return policy.model.get_parameter("model.language_model.layers.0.linear_attn.in_proj_qkv.weight").grad.clone()

    whole = gradient()
    monkeypatch.setattr(
        linear_attention,
        "_read_completions",
        lambda module, states, *rest: read_completions(
            module, LinearStates(*(tensor.detach() for tensor in states)), *rest
        ),
    )
    assert float((gradient() - whole).abs().max()) > 0.01 * float(whole.abs().max())


@pytest.mark.parametrize("group_size", [1, 3])
@pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)
def test_a_rollout_leaves_the_prompts_as_they_are_for_the_next_one(policy: Policy, group_size):
    prompts = policy.prefill(oracle.encode(policy.processor))
    before = [tensor.clone() for tensor in prompts.tensors()]
    params = policy.sampling_params(max_new_tokens=6)
    rollouts = [policy.generate(prompts, group_size=group_size, params=params, seeds=[1, 2, 3]) for _ in range(2)]
    assert all(torch.equal(*pair) for pair in zip(prompts.tensors(), before, strict=True))
    assert all(torch.equal(*pair) for pair in zip(*(rollout.completions for rollout in rollouts), strict=True))


@pytest.mark.parametrize("family", ["qwen3_5"], indirect=True)
def test_states_stay_in_full_precision_where_the_rest_is_halved(policy: Policy):
    policy.float()
    prompts = oracle.encode(policy.processor)
    exact = policy.prefill(prompts).linear_states
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = policy.prefill(prompts).linear_states
    for number, states in mixed.items():
        assert (states.recurrent.dtype, states.inputs.dtype) == (torch.float32, torch.bfloat16)
        scale = float(exact[number].recurrent.abs().max())
        assert float((states.recurrent - exact[number].recurrent).abs().max()) < 0.05 * scale
