"""Groups that are split: the same numbers as whole ones, and each prompt computed once."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from perception_r1.modules import GRPO
from perception_r1.modules.shared_prompts import SharedPrompts
from perception_r1.policy import attention
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.load import LoraConfig, PolicyConfig
from perception_r1.policy.packing import plan_micro_batches
from perception_r1.policy.policy import Policy
from tests.modules.toy import Log, fit, make_module, trained_weights
from tests.policy import oracle

LENGTHS = [3, 7, 1, 5, 4, 2, 6, 6, 1]
"""Three completions of each of three prompts, some of a single token."""


@pytest.fixture(params=[name for name, family in FAMILIES.items() if family.shares_prompts])
def family(request):
    return request.param


def passes(policy, budget, *, in_one_pass=False, are_known=False):
    """Log-probabilities of every completion and gradients of all weights, of a loss that weighs each differently."""
    prompts, completions = oracle.encode(policy.processor), oracle.random_completions(LENGTHS)
    known = policy.prompt_states(prompts) if are_known else None
    micro_batches = plan_micro_batches([0] * 3 if are_known else prompts.lengths, LENGTHS, range(3), budget)
    weights, rows = torch.linspace(-1, 1, len(LENGTHS), dtype=torch.float64), {}
    shared = SharedPrompts(policy, known=known, num_parts=len(micro_batches), in_one_pass=in_one_pass)
    policy.network.zero_grad()
    for micro_batch in micro_batches:
        selected = prompts.select(micro_batch.prompts)
        states = shared.states(selected, micro_batch)
        logprobs = policy(selected, [completions[row] for row in micro_batch.rows], 0.7, 1.0, states)
        loss = (weights[micro_batch.rows] * logprobs.sum(1)).sum()
        values = []
        for each in shared.losses(loss, micro_batch):
            each.backward()
            values.append(float(each))
        assert values in ([float(loss)], [float(loss), 0.0])
        rows |= {row: each[: LENGTHS[row]].detach() for row, each in zip(micro_batch.rows, logprobs, strict=True)}
    gradients = {name: value.grad for name, value in policy.network.named_parameters() if value.grad is not None}
    return torch.cat([rows[row] for row in range(len(LENGTHS))]), gradients, micro_batches


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "checkpointed", "lora", "frozen_vision"])
def test_parts_give_the_numbers_and_gradients_of_whole_groups(grouped_folders, family, kind):
    config = PolicyConfig(
        name=str(grouped_folders[family]),
        gradient_checkpointing=kind == "checkpointed",
        lora=LoraConfig(r=2) if kind == "lora" else None,
        freeze_vision=kind == "frozen_vision",
    )
    policy = Policy.load(config).double().train()
    oracle.shake(policy.network)
    expected, gradients, _ = passes(policy, None)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    for budget, num_parts, in_one_pass in ((70, 2, False), (1, 3, False), (1, 3, True)):
        found, others, micro_batches = passes(policy, budget, in_one_pass=in_one_pass)
        assert max(micro_batch.num_parts for micro_batch in micro_batches) >= num_parts
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
        assert others.keys() == gradients.keys()
        for name, gradient in gradients.items():
            scale = max(1e-6, float(gradient.abs().max()))
            assert float((others[name] - gradient).abs().max()) / scale < 1e-5, name  # float32 inside transformers


@pytest.mark.parametrize("in_one_pass", [False, True], ids=["passes of their own", "in one pass"])
@pytest.mark.parametrize(("budget", "num_parts"), [(13, 3), (1, 9)])
def test_all_prompts_that_are_known_are_shared_by_all_parts(grouped_folders, family, budget, num_parts, in_one_pass):
    policy = Policy.load(PolicyConfig(name=str(grouped_folders[family]))).double().train()
    oracle.shake(policy.network)
    expected, gradients, _ = passes(policy, None)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    found, others, micro_batches = passes(policy, budget, in_one_pass=in_one_pass, are_known=True)
    assert len(micro_batches) == num_parts
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert others.keys() == gradients.keys()
    for name, gradient in gradients.items():
        scale = max(1e-6, float(gradient.abs().max()))
        assert float((others[name] - gradient).abs().max()) / scale < 1e-5, name


def test_the_comparison_would_notice_a_prompt_that_learns_from_its_last_part_alone(grouped_folders, monkeypatch):
    policy = Policy.load(PolicyConfig(name=str(grouped_folders["qwen2_vl"]))).double().train()
    _, gradients, _ = passes(policy, None)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    monkeypatch.setattr(SharedPrompts, "losses", lambda self, loss, micro_batch: [loss])
    _, others, _ = passes(policy, 1, in_one_pass=True)
    name = "model.language_model.layers.0.self_attn.k_proj.weight"
    scale = float(gradients[name].abs().max())
    assert float((others[name] - gradients[name]).abs().max()) / scale > 1e-2


def test_a_prompt_is_computed_once_however_many_parts_its_group_has(grouped_folders, monkeypatch):
    policy = Policy.load(PolicyConfig(name=str(grouped_folders["qwen2_vl"]))).double().train()
    causal = []

    def count(query, *args, **options):
        causal.append(options.get("is_causal", False) and query.shape[2] > 1)
        return scaled_dot_product_attention(query, *args, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", count)
    _, _, micro_batches = passes(policy, 1)
    assert len(micro_batches) == len(LENGTHS)
    assert sum(causal) == 3 * len(policy.model.model.language_model.layers)


def test_a_run_of_split_groups_is_that_of_whole_ones(folder, tmp_path):
    """With a penalty towards the reference, whose passes are split as well."""
    runs = []
    torch.set_default_dtype(torch.float64)
    try:
        for version, budget in enumerate((None, 80)):
            log, module = Log(), make_module(folder, GRPO, micro_batch_tokens=budget, policy={"dtype": "float64"})
            fit(folder, tmp_path, module, [log], max_steps=3, version=version, precision="64-true")
            runs.append((trained_weights(module), log.steps))
    finally:
        torch.set_default_dtype(torch.float32)
    for name, weight in runs[0][0].items():
        torch.testing.assert_close(runs[1][0][name], weight, rtol=0, atol=1e-7)
    assert runs[0][1][3]["train/loss"] == pytest.approx(runs[1][1][3]["train/loss"], rel=1e-5)
    assert runs[0][1][3]["train/tokens/packed"] == runs[1][1][3]["train/tokens/packed"]
