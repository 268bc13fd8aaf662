"""Advantages beside worked values, definitions in plain Python, and TRL's formula."""

import json
import math
import random
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch

from perception_r1.grpo.advantages import (
    entropy_bonus,
    group_advantages,
    has_zero_std,
    is_uncertain,
    normalized_terms,
    reward_to_go_advantages,
)
from perception_r1.grpo.loss import LossConfig, grpo_loss

ADVANTAGES = Path(__file__).parents[1] / "golden" / "advantages.jsonl"
GOLDEN = [json.loads(line) for line in ADVANTAGES.read_text().splitlines()]


@pytest.mark.parametrize("row", GOLDEN)
def test_advantages_agree_with_worked_values(row):
    rewards = torch.tensor(row["rewards"], dtype=torch.float64)
    advantages = group_advantages(rewards.flatten(), rewards.shape[1])
    torch.testing.assert_close(advantages.view_as(rewards), torch.tensor(row["expect"]).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("group_size", [2, 3, 5, 7, 8, 16])
@pytest.mark.parametrize("scale", ["group", "none"])
def test_equal_rewards_give_zero_advantage_whatever_the_rounding(group_size, scale):
    rewards = torch.rand(200, generator=torch.Generator().manual_seed(0)).repeat_interleave(group_size)
    assert torch.equal(group_advantages(rewards, group_size, scale=scale), torch.zeros(len(rewards)))
    assert has_zero_std(rewards, group_size).all()


def test_a_group_with_one_other_reward_is_no_equal_group():
    assert has_zero_std(torch.tensor([0.1, 0.1, 0.1, 0.2, 0.3, 0.3]), 3).tolist() == [True, False]


def test_unscaled_advantages_are_differences_from_the_mean():
    advantages = group_advantages(torch.tensor([1.0, 0.0, 5.0, 3.0]), 2, scale="none")
    assert advantages.tolist() == [0.5, -0.5, 1.0, -1.0]


@pytest.mark.parametrize("group_size", [1, 0, -2])
def test_a_group_of_one_is_refused(group_size):
    with pytest.raises(ValueError, match=f"group_size is {group_size}"):
        group_advantages(torch.ones(4), group_size)


@pytest.mark.parametrize("shape", [(5,), (2, 3), ()])
def test_rewards_that_cannot_be_grouped_are_refused(shape):
    with pytest.raises(ValueError, match="cannot be grouped by 3"):
        group_advantages(torch.ones(shape), 3)


def test_rloo_compares_with_the_mean_of_the_others():
    rewards = torch.tensor([1.0, 0.25, 0.5, 2.0, 2.0, -1.0], dtype=torch.float64)
    found = group_advantages(rewards, 3, estimator="rloo", scale="none")
    for index, reward in enumerate(rewards.tolist()):
        group = rewards[index // 3 * 3 : index // 3 * 3 + 3].tolist()
        others = [other for k, other in enumerate(group) if k != index % 3]
        assert float(found[index]) == pytest.approx(reward - sum(others) / 2, rel=1e-12)


def naive_to_go(rewards, group_size, scale):
    """Part by part, in plain Python."""
    left = [[row[-1] - row[part] for part in range(len(row) - 1)] for row in rewards]
    found = []
    for index, row in enumerate(left):
        group = left[index // group_size * group_size :][:group_size]
        found.append(
            [value - statistics.mean(other[k] for other in group if len(other) > k) for k, value in enumerate(row)]
        )
    scaled = []
    for index, row in enumerate(found):
        group = found[index // group_size * group_size :][:group_size]
        values = [value for other in group for value in other]
        size = 1 if scale == "none" else math.sqrt(statistics.mean(value**2 for value in values)) + 1e-4
        scaled.append([value / size for value in row])
    return scaled


@pytest.mark.parametrize("scale", ["group", "none"])
def test_rewards_to_go_equal_a_loop_over_parts(scale):
    draw = random.Random(0)
    rewards = [[draw.random() for _ in range(draw.randrange(2, 7))] for _ in range(12)]
    found = reward_to_go_advantages(rewards, 4, scale=scale)
    for row, expected in zip(found, naive_to_go(rewards, 4, scale), strict=True):
        assert row == pytest.approx(expected, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("scale", ["group", "none"])
def test_a_group_in_which_nothing_differs_has_no_advantage(scale):
    assert reward_to_go_advantages([[0.1, 0.3, 0.7, 0.6]] * 3, 3, scale=scale) == [[0.0] * 3] * 3


def test_without_boxes_they_are_differences_of_rewards():
    rewards = [0.25, 1.0, 0.5, 2.0]
    found = reward_to_go_advantages([[0.125, reward] for reward in rewards], 4, scale="none")
    assert [row[0] for row in found] == group_advantages(torch.tensor(rewards), 4, scale="none").tolist()


def test_their_gradient_is_that_of_the_expected_reward():
    """Over all groups of two completions of two boxes, each of one of two kinds, weighted by how probable they are."""
    logits = torch.randn(
        3, 2, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )  # first; second given it
    after = {(): 0.25, (0,): 0.5, (1,): -0.25, (0, 0): 1.0, (0, 1): 0.75, (1, 0): 2.0, (1, 1): -1.0}
    pairs = [(first, second) for first in (0, 1) for second in (0, 1)]

    def logprobs(leaf, pair):
        return torch.stack([leaf[0].log_softmax(0)[pair[0]], leaf[1 + pair[0]].log_softmax(0)[pair[1]]])

    exact = logits.clone().requires_grad_()
    sum(logprobs(exact, pair).sum().exp() * after[pair] for pair in pairs).backward()
    expected = torch.zeros_like(logits)
    for one in pairs:
        for other in pairs:
            rewards = [[after[()], after[pair[:1]], after[pair], after[pair]] for pair in (one, other)]
            advantages = reward_to_go_advantages(rewards, 2, scale="none")
            leaf = logits.clone().requires_grad_()
            rows = torch.stack([logprobs(leaf, one), logprobs(leaf, other)])
            probability = rows.sum().exp().detach()
            gain = torch.tensor([row[:2] for row in advantages], dtype=torch.float64)
            output = grpo_loss(
                rows,
                rows.detach(),
                None,
                advantages=gain,
                weights=torch.full((2,), 0.5, dtype=torch.float64),
                is_token=torch.ones(2, 2, dtype=torch.bool),
                config=LossConfig(kl_coef=0.0),
            )
            output.loss.backward()
            expected -= probability * leaf.grad
    # a completion is half of its own baseline, which takes half of what is common to the group: as in GRPO
    torch.testing.assert_close(expected, exact.grad / 2, rtol=1e-12, atol=1e-12)


def test_terms_are_compared_on_scales_of_their_own():
    draw = np.random.default_rng(0)
    values, weights = draw.normal(size=(12, 3)) * [1, 100, 0.01], np.tile([1.0, 0.5, -2.0], (12, 1))
    expected = np.zeros(12)
    for start in range(0, 12, 4):
        group = values[start : start + 4]
        expected[start : start + 4] = ((group - group.mean(0)) / (group.std(0, ddof=1) + 1e-4)) @ weights[0]
    found = normalized_terms(torch.from_numpy(values), torch.from_numpy(weights), 4)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def test_a_term_that_is_the_same_throughout_a_group_adds_nothing():
    values = torch.tensor([[1.0, 0.1], [0.0, 0.1], [0.5, 0.3], [0.5, 0.1]])
    found = normalized_terms(values, torch.ones(4, 2), 2)
    alone = group_advantages(torch.tensor([1.0, 0.0, 0.3, 0.1]), 2)
    assert found.tolist() == pytest.approx(alone.tolist())


def test_the_entropy_bonus_pulls_as_the_gradient_of_the_entropy():
    """In expectation over one token out of six."""
    logits = torch.randn(6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    exact = logits.clone().requires_grad_()
    entropy = torch.special.entr(exact.softmax(0)).sum()
    entropy.backward()
    leaf = logits.clone().requires_grad_()
    logprobs = leaf.log_softmax(0)
    bonus = entropy_bonus(logprobs.detach(), entropy.detach().expand(6))
    (logprobs.exp().detach() * bonus * logprobs).sum().backward()
    torch.testing.assert_close(leaf.grad, exact.grad, rtol=1e-10, atol=1e-12)
    assert float((logprobs.exp() * bonus).sum()) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 1.0])
def test_uncertain_tokens_are_those_above_the_quantile(share):
    entropies = torch.rand(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chosen = is_uncertain(entropies, share)
    expected = sorted(entropies.tolist(), reverse=True)[: max(1, round(50 * share))]
    assert sorted(entropies[chosen].tolist(), reverse=True) == expected
    assert is_uncertain(torch.zeros(4), 0.25).all()  # ties are kept
