"""Families whose prompts are repeated: beside plain forwards, and beside the engine where both can compute a family."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForImageTextToText, LlamaConfig

from perception_r1.errors import UserError
from perception_r1.policy.families import FAMILIES, Family
from perception_r1.policy.families.qwen3_vl import Qwen3VL
from perception_r1.policy.load import LoraConfig, PolicyConfig, load_model
from perception_r1.policy.policy import Policy
from perception_r1.policy.repeated import PaddedPrompts
from tests.policy import oracle
from tests.policy.test_logprobs import (
    LENGTHS,
    assert_same_gradients,
    assert_same_rows,
    naive_logprobs,
    weighted_sum,
    without_padding,
)
from tests.tiny_models import build_internvl, internvl_config, internvl_tokenizer

REPEATED = [name for name, family in FAMILIES.items() if not family.shares_prompts]
HAS_MASKS = [name for name in REPEATED if type(FAMILIES[name]).mask_inputs is not Family.mask_inputs]
BOTH = [
    name
    for name, family in FAMILIES.items()
    if family.shares_prompts and family.layer_types == {"full_attention"} and not isinstance(family, Qwen3VL)
]
"""Families that both ways can compute: Qwen3-VL's features reach further layers."""


def completions_of(policy, lengths=LENGTHS):
    """Random ones without tokens that are never written."""
    written = torch.tensor(sorted(set(range(270)) - set(policy.suppress_tokens.tolist())))
    return [written[completion % len(written)] for completion in oracle.random_completions(lengths)]


@pytest.fixture(params=REPEATED)
def family(request):
    return request.param


@pytest.fixture
def plain(grouped_folders, family, exact_layers):
    return oracle.plain_model(grouped_folders[family])


@pytest.fixture
def policy(grouped_folders, family, plain):
    """A policy in float64, also in what transformers holds in float32."""
    policy = Policy.load(PolicyConfig(name=str(grouped_folders[family]))).double().eval()
    exact = dict(plain.named_buffers())
    for name, buffer in policy.model.named_buffers():
        buffer.copy_(exact[name])
    return policy


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_logprobs_and_all_gradients_are_those_of_plain_forwards(policy, plain, is_checkpointed):
    policy.train(is_checkpointed)
    if is_checkpointed:
        policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    completions = completions_of(policy)
    rows = without_padding(policy(oracle.encode(policy.processor), completions, 0.7), completions)
    naive = naive_logprobs(plain, policy, completions, 0.7)
    assert_same_rows(rows, naive)
    weighted_sum(rows).backward()
    weighted_sum(naive).backward()
    assert_same_gradients(policy.network, plain)
    gradients = {name: float(p.grad.abs().max()) for name, p in policy.network.named_parameters() if p.grad is not None}
    assert max(size for name, size in gradients.items() if oracle.is_vision(name)) > 1e-3


@pytest.mark.parametrize("family", HAS_MASKS, indirect=True)
def test_the_comparison_would_notice_images_whose_tokens_are_read_in_order(policy, plain, monkeypatch):
    completions = completions_of(policy)
    monkeypatch.setattr(type(policy.family), "mask_inputs", lambda self, is_image: {})
    rows = without_padding(policy(oracle.encode(policy.processor), completions), completions)
    naive = naive_logprobs(plain, policy, completions, 1.0)
    assert min(float((row - other).detach().abs().max()) for row, other in zip(rows, naive, strict=True)) > 1e-6


def test_greedy_completions_are_those_of_transformers(policy, plain):
    prompts = oracle.encode(policy.processor)
    params = policy.sampling_params(max_new_tokens=12, is_greedy=True)
    rollout = policy.generate(policy.prefill(prompts), group_size=1, params=params, seeds=[0, 0, 0])
    for index, completion in enumerate(rollout.completions):
        inputs = oracle.inputs(plain, prompts.select([index]))
        expected = plain.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=policy.suppress_tokens.tolist(),
            eos_token_id=policy.eos_token_ids.tolist(),
        )[0, inputs["input_ids"].shape[1] :]
        assert completion.tolist() == expected.tolist()
    assert len({tuple(completion.tolist()) for completion in rollout.completions}) > 1


@pytest.mark.parametrize("options", [{}, {"temperature": 0.7, "top_p": 0.8}], ids=str)
def test_sampled_logprobs_are_those_of_training(policy, options):
    prompts = oracle.encode(policy.processor)
    params = policy.sampling_params(max_new_tokens=25, **options)
    params = replace(params, eos_token_ids=torch.arange(10, 50))  # rows end at any time
    cache = policy.prefill(prompts)
    rollout = policy.generate(cache, group_size=4, params=params, seeds=[1, 2, 3])
    again = policy.generate(cache, group_size=4, params=params, seeds=[1, 2, 3])
    assert [row.tolist() for row in again.completions] == [row.tolist() for row in rollout.completions]
    with torch.no_grad():
        logprobs = without_padding(policy(prompts, rollout.completions, **options), rollout.completions)
    assert_same_rows(logprobs, rollout.logprobs)
    assert len({len(row) for row in rollout.completions}) > 2  # rows have left the cache
    lone = policy.generate(policy.prefill(prompts.select([2])), group_size=4, params=params, seeds=[3])
    assert [row.tolist() for row in lone.completions] == [row.tolist() for row in rollout.completions[8:]]


def test_features_are_computed_once_for_each_prompt_and_not_again_where_they_are_known(policy):
    prompts, completions, calls = oracle.encode(policy.processor), completions_of(policy), []
    tower = policy.family.vision_modules(policy.model)[0]
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(next(filter(torch.is_tensor, (*args, *kwargs.values()))))),
        with_kwargs=True,
    )
    expected = policy(prompts, completions).detach()
    num_pictures = sum(len(pixels) for pixels in prompts.pixel_values)
    assert calls == [num_pictures]
    seen = policy.encode_images(prompts)
    assert torch.equal(policy(seen, completions), expected)
    assert calls == [num_pictures] * 2


def test_an_adapter_and_a_frozen_tower_train_what_they_should(grouped_folders, family):
    policy = Policy.load(PolicyConfig(name=str(grouped_folders[family]), lora=LoraConfig(r=2)))
    assert policy.is_vision_frozen
    policy(oracle.encode(policy.processor), completions_of(policy)).sum().backward()
    trained = {name for name, parameter in policy.network.named_parameters() if parameter.grad is not None}
    frozen = Policy.load(PolicyConfig(name=str(grouped_folders[family]), freeze_vision=True))
    linears = [m for m in frozen.model.model.language_model.layers.modules() if isinstance(m, torch.nn.Linear)]
    assert len(trained) == 2 * len(linears)  # two matrices for each
    assert not any(oracle.is_vision(name) for name in trained)
    assert frozen.is_vision_frozen
    assert {name for name, p in frozen.network.named_parameters() if not p.requires_grad} == {
        name for name, _ in frozen.network.named_parameters() if oracle.is_vision(name)
    }


def test_internvl_with_a_language_model_of_qwen3_computes_what_transformers_does(tmp_path):
    build_internvl(tmp_path, model_type="qwen3")
    policy, plain = Policy.load(PolicyConfig(name=str(tmp_path))).eval(), oracle.plain_model(tmp_path, torch.float32)
    prompts, completions = oracle.encode(policy.processor), completions_of(policy)
    with torch.no_grad():
        rows = without_padding(policy(prompts, completions), completions)
        assert_same_rows(rows, naive_logprobs(plain, policy, completions, 1.0), tolerance=1e-4)
        params = policy.sampling_params(max_new_tokens=8)
        rollout = policy.generate(policy.prefill(prompts), group_size=2, params=params, seeds=[1, 2, 3])
        again = without_padding(policy(prompts, rollout.completions), rollout.completions)
        assert_same_rows(again, rollout.logprobs, tolerance=1e-4)


def test_another_language_model_is_refused(tmp_path):
    tokenizer = internvl_tokenizer()
    config = internvl_config(tokenizer)
    config.text_config = LlamaConfig(**{name: getattr(config.text_config, name) for name in ("vocab_size", *SIZES)})
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has a language model of the family llama; known are qwen2, qwen3"):
        load_model(PolicyConfig(name=str(tmp_path)))


SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")


@pytest.fixture(params=BOTH)
def both(request, grouped_folders, monkeypatch):
    """A policy of a family as the engine computes it, and one of the same weights with repeated prompts."""
    config = PolicyConfig(name=str(grouped_folders[request.param]))
    shared = Policy.load(config).double().eval()
    plain_class = type(FAMILIES[request.param])
    without_sharing = type("WithoutSharing", (plain_class,), {"shares_prompts": False})()

    class Repeated(Policy):
        family = without_sharing

    return shared, Repeated.load(config).double().eval()


def test_repeated_prompts_compute_what_shared_ones_do(both):
    shared, repeated = both
    prompts, completions = oracle.encode(shared.processor), completions_of(shared)
    rows = [policy(prompts, completions, 0.7, 0.9) for policy in both]
    torch.testing.assert_close(*rows, rtol=1e-5, atol=1e-5)
    for row in rows:
        weighted_sum(without_padding(row, completions)).backward()
    assert_same_gradients(repeated.network, shared.network, tolerance=1e-4)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.3}, {"top_p": 0.8}, {"is_greedy": True}], ids=str)
@pytest.mark.parametrize("group_size", [1, 3])
def test_repeated_prompts_are_answered_as_shared_ones(both, options, group_size):
    found = []
    for policy in both:
        prompts = policy.prefill(oracle.encode(policy.processor))
        assert isinstance(prompts, PaddedPrompts) == (policy is both[1])
        params = policy.sampling_params(max_new_tokens=15, **options)
        found.append(policy.generate(prompts, group_size=group_size, params=params, seeds=[1, 2, 3]))
    assert [row.tolist() for row in found[0].completions] == [row.tolist() for row in found[1].completions]
    assert found[0].is_truncated == found[1].is_truncated
    for name in ("logprobs", "entropies"):
        pairs = [torch.cat(getattr(rollout, name)) for rollout in found]
        torch.testing.assert_close(*pairs, rtol=1e-5, atol=1e-5)


def test_features_for_further_layers_are_refused(both):
    _, repeated = both
    prompts = oracle.encode(repeated.processor)
    deeper = tuple(torch.cat([image, image]) for image in repeated.encode_images(prompts).image_features)
    with pytest.raises(ValueError, match="further layers"):
        repeated(replace(prompts, image_features=deeper), completions_of(repeated))
