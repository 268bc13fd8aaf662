from dataclasses import replace

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from perception_r1.policy import attention
from perception_r1.policy import logprobs as logprobs_module
from perception_r1.policy.forward import lay_out_row
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.packing import pack, plan_micro_batches
from perception_r1.policy.policy import Policy
from tests.policy import oracle

LENGTHS = [3, 7, 1, 5, 4, 2, 6, 6, 1]
"""Three completions of each of three prompts, some of a single token."""


def naive_logprobs(plain, policy, completions, temperature, indices=(0, 1, 2), top_p=1.0):
    """A plain forward of each row alone."""
    group_size = len(completions) // len(indices)
    rows = []
    for index, completion in enumerate(completions):
        prompt = oracle.encode(policy.processor, [indices[index // group_size]])
        rows.append(oracle.logprobs(plain, prompt, completion, policy.suppress_tokens, temperature, top_p))
    return rows


def distance(network, plain):
    """How far the gradients are from those of the plain model: of each parameter, as a share of the largest entry."""
    expected = dict(plain.named_parameters())
    shares = {}
    for name, parameter in network.named_parameters():
        if expected[name].grad is None:
            assert parameter.grad is None, name
            continue
        scale = max(float(expected[name].grad.abs().max()), 1e-6)
        shares[name] = float((parameter.grad - expected[name].grad).abs().max()) / scale
    return shares


def assert_same_gradients(network, plain, tolerance=1e-6):
    shares = distance(network, plain)
    assert len(shares) > 60
    assert {name: share for name, share in shares.items() if share > tolerance} == {}
    assert any(oracle.is_vision(name) and network.get_parameter(name).grad.abs().max() > 0 for name in shares)


def weighted_sum(rows):
    """A number on which every log-probability has an influence of its own."""
    return sum((row * torch.linspace(-1 - index, 1, len(row) + 1)[:-1]).sum() for index, row in enumerate(rows))


def without_padding(logprobs, completions):
    return [row[: len(completion)] for row, completion in zip(logprobs, completions, strict=True)]


def assert_same_rows(rows, expected, tolerance=1e-12):
    for row, other in zip(rows, expected, strict=True):
        torch.testing.assert_close(row, other, rtol=0, atol=tolerance)


def count_calls(module):
    """A list that grows with every call of a module."""
    calls = []
    module.register_forward_hook(lambda *call: calls.append(call))
    return calls


@pytest.mark.parametrize("head_rows", [3, 1000])
def test_in_a_nucleus_they_are_those_of_the_sampler_and_so_are_their_gradients(
    policy, plain, exact_layers, monkeypatch, head_rows
):
    monkeypatch.setattr(logprobs_module, "_HEAD_ROWS", head_rows)
    temperature, top_p = 0.9, 0.6
    prompts = oracle.encode(policy.processor)
    params = policy.sampling_params(max_new_tokens=6, temperature=temperature, top_p=top_p)
    rollout = policy.generate(policy.prefill(prompts), group_size=3, params=params, seeds=[1, 2, 3])
    rows = without_padding(policy(prompts, rollout.completions, temperature, top_p), rollout.completions)
    assert_same_rows([row.detach() for row in rows], rollout.logprobs)
    full = naive_logprobs(plain, policy, rollout.completions, temperature)
    assert max(float((row - other).detach().max()) for row, other in zip(rows, full, strict=True)) > 0.1
    weighted_sum(rows).backward()
    weighted_sum(naive_logprobs(plain, policy, rollout.completions, temperature, top_p=top_p)).backward()
    assert_same_gradients(policy.model, plain)


def test_what_was_written_stays_in_the_nucleus(policy, exact_layers):
    completions = oracle.random_completions(LENGTHS)
    with torch.no_grad():
        logprobs = policy(oracle.encode(policy.processor), completions, 1.0, 1e-9)
    rows = without_padding(logprobs, completions)
    assert all(bool(row.isfinite().all()) for row in rows)
    assert float(min(row.min() for row in rows)) < -0.7  # beside the most probable token alone


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
    assert_same_gradients(policy.network, plain, tolerance=1e-9)


@pytest.mark.parametrize("lengths", [[1, 1], [1, 4], [4, 1]])
def test_completions_of_one_token_are_fine(policy, plain, exact_layers, lengths):
    completions = oracle.random_completions(lengths)
    with torch.no_grad():
        logprobs = policy(oracle.encode(policy.processor, [1]), completions)
        naive = naive_logprobs(plain, policy, completions, 1.0, indices=[1])
    for row, expected in zip(logprobs, naive, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=1e-12)


def test_probabilities_of_all_tokens_that_may_be_written_add_up_to_one(policy):
    prompt = oracle.encode(policy.processor, [0])
    size = policy.model.config.text_config.vocab_size
    with torch.no_grad():
        logprobs = policy(prompt, [torch.tensor([token]) for token in range(size)], 0.9)[:, 0]
    assert float(logprobs.exp().sum()) == pytest.approx(1.0)
    assert (logprobs == float("-inf")).nonzero()[:, 0].tolist() == policy.suppress_tokens.tolist()


def test_the_comparison_would_notice_positions_that_are_off_by_one(policy, plain, exact_layers):
    prompts, completion = oracle.encode(policy.processor, [0]), oracle.random_completions([5])
    prompts = replace(prompts, next_positions=(prompts.next_positions[0] + 1,))
    with torch.no_grad():
        logprobs = policy(prompts, completion)[0]
        naive = naive_logprobs(plain, policy, completion, 1.0, indices=[0])[0]
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


@pytest.mark.parametrize("family", ["qwen2_vl"], indirect=True)
def test_under_autocast_keys_are_in_half_precision_before_they_are_copied(policy, monkeypatch):
    policy.float()
    completions = oracle.random_completions(LENGTHS)
    kinds = set()

    def watched(query, key, value, **options):
        kinds.update(tensor.dtype for tensor in (query, key, value))
        return scaled_dot_product_attention(query, key, value, **options)

    def rounded(query, key, value, **options):
        return scaled_dot_product_attention(*(tensor.bfloat16() for tensor in (query, key, value)), **options)

    prompts = oracle.encode(policy.processor, [0, 1, 2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", watched)
        found = policy(prompts, completions)
        monkeypatch.setattr(attention.F, "scaled_dot_product_attention", rounded)
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)
        late = policy(prompts, completions)
    assert kinds == {torch.bfloat16}
    assert torch.equal(found, late)


@pytest.mark.parametrize("lora", [None, LoraConfig(r=2)])
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


MIXED = [2, 0, 1, 3, 4]
"""Prompts that are not in order of length, three of the same length among them, one with two pictures."""

MIXED_LENGTHS = [3, 7, 1, 5, 4, 2, 6, 6, 2, 1]


@pytest.mark.parametrize("family", oracle.PATCH_FAMILIES, indirect=True)
def test_prompts_of_equal_and_other_lengths_come_back_in_the_order_given(policy, plain, exact_layers):
    prompts, completions = oracle.encode(policy.processor, MIXED), oracle.random_completions(MIXED_LENGTHS)
    assert sorted(prompts.lengths) != prompts.lengths
    assert prompts.lengths[1] == prompts.lengths[3] == prompts.lengths[4]
    rows = without_padding(policy(prompts, completions, 0.7), completions)
    naive = naive_logprobs(plain, policy, completions, 0.7, indices=MIXED)
    assert_same_rows(rows, naive)
    weighted_sum(rows).backward()
    weighted_sum(naive).backward()
    assert_same_gradients(policy.network, plain)


@pytest.mark.parametrize("family", oracle.PATCH_FAMILIES, indirect=True)
def test_prompts_of_equal_length_are_computed_together_wherever_they_stand(policy, monkeypatch):
    rows = []

    def spy(*args):
        packing = pack(*args)
        rows.append([(bucket.num_prompts, bucket.length) for bucket in packing.buckets])
        return packing

    for name in ("logprobs", "prefill"):
        monkeypatch.setattr(f"perception_r1.policy.{name}.pack", spy)
    prompts = oracle.encode(policy.processor, MIXED)
    policy(prompts, oracle.random_completions(MIXED_LENGTHS))
    policy.prefill(prompts)
    short, middle, long = sorted(set(prompts.lengths))
    assert rows == [[(1, short), (3, middle), (1, long)]] * 2


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_with_an_adapter_every_gradient_equals_that_of_the_plain_model_in_the_same_adapter(
    adapted, adapted_plain, exact_layers, is_checkpointed
):
    if is_checkpointed:
        adapted.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapted.network.requires_grad_(True).train()
    adapted_plain.requires_grad_(True)
    calls = count_calls(adapted.model.model.language_model.layers[0].input_layernorm)
    completions = oracle.random_completions(MIXED_LENGTHS)
    rows = without_padding(adapted(oracle.encode(adapted.processor, MIXED), completions, 0.7), completions)
    naive = naive_logprobs(adapted_plain, adapted, completions, 0.7, indices=MIXED)
    assert_same_rows(rows, naive)
    weighted_sum(rows).backward()
    weighted_sum(naive).backward()
    assert len(calls) == (2 if is_checkpointed else 1)
    assert_same_gradients(adapted.network, adapted_plain)
    lora = [parameter.grad for name, parameter in adapted.network.named_parameters() if "lora_" in name]
    assert min(float(gradient.abs().max()) for gradient in lora) > 0


def test_checkpointed_gradients_of_all_weights_equal_those_of_plain_forwards(policy, plain, exact_layers):
    policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    policy.train()
    completions = oracle.random_completions(MIXED_LENGTHS)
    logprobs = policy(oracle.encode(policy.processor, MIXED), completions)
    weighted_sum(without_padding(logprobs, completions)).backward()
    weighted_sum(naive_logprobs(plain, policy, completions, 1.0, indices=MIXED)).backward()
    assert_same_gradients(policy.network, plain)


@pytest.mark.parametrize(("budget", "num_parts"), [(None, {1}), (70, {4, 6}), (1, {10})])
def test_gradients_of_micro_batches_add_up_to_those_of_the_whole(policy, plain, exact_layers, budget, num_parts):
    prompts, completions = oracle.encode(policy.processor, MIXED), oracle.random_completions(MIXED_LENGTHS)
    naive = naive_logprobs(plain, policy, completions, 1.0, indices=MIXED)
    weights = torch.linspace(-1, 1, len(completions))
    sum(weight * row.sum() for weight, row in zip(weights, naive, strict=True)).backward()
    micro_batches = plan_micro_batches(prompts.lengths, MIXED_LENGTHS, range(len(MIXED)), budget)
    assert len(micro_batches) in num_parts  # prompts of InternVL are longer
    for micro_batch in micro_batches:
        logprobs = policy(prompts.select(micro_batch.prompts), [completions[row] for row in micro_batch.rows])
        (weights[micro_batch.rows] * logprobs.sum(1)).sum().backward()
    assert_same_gradients(policy.network, plain)


def test_prompts_with_features_give_the_same_without_the_vision_tower(policy):
    prompts, completions = oracle.encode(policy.processor, MIXED), oracle.random_completions(MIXED_LENGTHS)
    expected = policy(prompts, completions).detach()
    calls = count_calls(policy.family.vision_modules(policy.model)[0])
    seen = policy.encode_images(prompts)
    assert len(calls) == 1
    logprobs = policy(seen, completions)
    one = policy(seen.select([2, 0]), completions[4:6] + completions[:2]).detach()
    assert len(calls) == 1
    assert torch.equal(logprobs, expected)
    assert_same_rows(
        without_padding(one, [completions[row] for row in (4, 5, 0, 1)]),
        [expected[row, : MIXED_LENGTHS[row]] for row in (4, 5, 0, 1)],
    )
    logprobs.sum().backward()
    gradients = {name: parameter.grad for name, parameter in policy.model.model.named_parameters()}
    assert all((gradient is None) == oracle.is_vision(name) for name, gradient in gradients.items())


def compare(policy, plain, indices, completions):
    """Distance of the log-probabilities, and of the gradients, from those of plain forwards."""
    logprobs = policy(oracle.encode(policy.processor, indices), completions)
    rows = without_padding(logprobs, completions)
    naive = naive_logprobs(plain, policy, completions, 1.0, indices=indices)
    weighted_sum(rows).backward()
    weighted_sum(naive).backward()
    differences = [(row - other).abs() for row, other in zip(rows, naive, strict=True)]
    return differences, distance(policy.network, plain)


def test_the_comparison_would_notice_prompts_through_which_completions_send_no_gradient(
    policy, plain, exact_layers, monkeypatch
):
    def without_gradient(query, key, value, prompt_key, prompt_value, *rest):
        return attend_completions(query, key, value, prompt_key.detach(), prompt_value.detach(), *rest)

    attend_completions = attention._attend_completions
    monkeypatch.setattr(attention, "_attend_completions", without_gradient)
    differences, shares = compare(policy, plain, [0, 2], oracle.random_completions([5, 4, 3, 6]))
    assert float(torch.cat(differences).max()) < 1e-12
    assert max(share for name, share in shares.items() if oracle.is_vision(name)) > 0.01
    assert max(share for name, share in shares.items() if ".k_proj." in name) > 0.01


@pytest.mark.parametrize("family", oracle.PATCH_FAMILIES, indirect=True)
def test_the_comparison_would_notice_completions_that_start_at_the_prompt_s_length(
    policy, plain, exact_layers, monkeypatch
):
    def shifted(prompts, *args, **kwargs):
        assert list(prompts.next_positions) != prompts.lengths
        return lay_out_row(replace(prompts, next_positions=tuple(prompts.lengths)), *args, **kwargs)

    monkeypatch.setattr("perception_r1.policy.forward.lay_out_row", shifted)
    differences, _ = compare(policy, plain, [0], oracle.random_completions([5, 4]))
    assert min(float(row[1:].min()) for row in differences) > 1e-6


def test_the_comparison_would_notice_completions_that_see_each_other(policy, plain, exact_layers, monkeypatch):
    def causal(module, query, key, value, mask, packing, scaling, **kwargs):
        attended = scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling, enable_gqa=True)
        return attended.transpose(1, 2), None

    monkeypatch.setitem(AttentionInterface._global_mapping, attention.NAME, causal)
    differences, _ = compare(policy, plain, [0], oracle.random_completions([5, 4]))
    assert float(differences[0].max()) < 1e-12
    assert float(differences[1][0]) < 1e-12
    assert float(differences[1][1:].min()) > 1e-6
