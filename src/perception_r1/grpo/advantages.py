"""What a completion is worth beside its group: rewards in, advantages out.

    advantage   A_i = (r_i - mean(r_group)) / (std(r_group) + 1e-4), std unbiased           GRPO, arXiv 2402.03300

There are also another estimator and no scale (`group_advantages`), terms of the reward on scales of their own
(`normalized_terms`), advantages for parts of a completion (`reward_to_go_advantages`), and what depends on the entropy
of tokens (`entropy_bonus`, `is_uncertain`). Scales that depend on other groups are those of a run, which knows its
tasks and its devices: `perception_r1/modules/advantages.py`.

Legend: B prompts, G completions per prompt, N = B*G completions, M tokens of all completions.
"""

import math
from collections.abc import Sequence
from typing import Literal

from torch import Tensor

GroupEstimator = Literal["grpo", "rloo"]
GroupScale = Literal["group", "none"]

STD_FLOOR = 1e-4
"""Added to every standard deviation that something is divided by."""


def group_advantages(
    rewards: Tensor,
    group_size: int,
    *,
    estimator: GroupEstimator = "grpo",
    scale: GroupScale = "group",
) -> Tensor:
    """How much better each completion is than its group.

    Args:
        rewards: [N] rewards, the G completions of a prompt after one another.
        group_size: G, at least 2.
        estimator: What a reward is compared with: the mean of its group (grpo), or that of the others in its group,
            which makes it G / (G - 1) times as large (rloo, arXiv 2402.14740).
        scale: Divide by the standard deviation of the group, or not at all (arXiv 2503.20783).

    Returns:
        [N] advantages; zero throughout a group of equal rewards.

    Raises:
        ValueError: The group is too small, or the rewards cannot be grouped.

    >>> import torch
    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), 2).round(decimals=3)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; a completion is compared with its group, so use 2 or more.")
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards cannot be grouped by {group_size}.")
    groups = rewards.view(-1, group_size)  # [B, G]
    centred = groups - groups.mean(1, keepdim=True)
    if estimator == "rloo":
        centred = centred * (group_size / (group_size - 1))
    if scale == "group":
        centred = centred / (groups.std(1, keepdim=True) + STD_FLOOR)
    return centred.masked_fill(has_zero_std(rewards, group_size)[:, None], 0.0).flatten()


def normalized_terms(values: Tensor, weights: Tensor, group_size: int) -> Tensor:
    """Terms of the reward, each compared with its group on a scale of its own, in sum (GDPO, arXiv 2601.05242).

    In a sum of rewards the term with the largest spread decides; here each has spread 1 before it is weighted. GDPO
    divides the result by the standard deviation of the whole batch.

    Args:
        values: [N, K] of each term, the G completions of a prompt after one another.
        weights: [N, K] of each term in the reward.
        group_size: G.

    Returns:
        [N] sums; a term that is the same throughout a group adds nothing.

    >>> import torch
    >>> values, weights = torch.tensor([[1.0, 0.0], [0.0, 0.1]]), torch.tensor([[1.0, 2.0], [1.0, 2.0]])
    >>> normalized_terms(values, weights, 2).round(decimals=2)
    tensor([-0.7100,  0.7100])
    """
    reward_terms = values.T.flatten()  # [K * N]: each term's completions after one another
    compared = group_advantages(reward_terms, group_size).view(values.shape[1], -1).T  # [N, K]
    return (weights * compared).sum(1)


def reward_to_go_advantages(
    rewards: Sequence[Sequence[float]], group_size: int, *, scale: GroupScale = "group"
) -> list[list[float]]:
    """Advantages of the parts of completions: what the reward still gained from a part on, compared with its group.

    The reward of a completion is the sum of what its parts added to it. A part has no influence on what was added
    before it, so the gradient of the expected reward needs only what was added from there on: this is the policy
    gradient with rewards to go. Their baseline is the mean over those completions of the group that have a part of this
    number. The completion itself is one of these, as it is one of G in GRPO's.

    Args:
        rewards: Of each of N completions, n + 2 numbers: the reward after none, one, ..., n boxes, and that of the
            whole. The last of its n + 1 parts is what stands behind the boxes.
        group_size: G, the completions of a prompt after one another.
        scale: Divide by the root mean square of what is left in a group, or not at all.

    Returns:
        Advantages of each completion's n + 1 parts.

    >>> reward_to_go_advantages([[0.0, 1.0, 1.0], [0.0, 0.5, 0.25]], 2, scale="none")
    [[0.375, 0.125], [-0.375, -0.125]]
    """
    groups = [rewards[start : start + group_size] for start in range(0, len(rewards), group_size)]
    centred: list[list[list[float]]] = []
    for group in groups:
        to_go = [[row[-1] - before for before in row[:-1]] for row in group]
        longest = max(map(len, to_go))
        parts = [[row[number] for row in to_go if number < len(row)] for number in range(longest)]
        baseline = [sum(values) / len(values) if min(values) < max(values) else values[0] for values in parts]
        centred.append([[value - baseline[number] for number, value in enumerate(row)] for row in to_go])
    if scale == "none":
        return [row for group in centred for row in group]
    scaled = []
    for group in centred:
        values = [value for row in group for value in row]
        size = math.sqrt(sum(value * value for value in values) / len(values)) + STD_FLOOR
        scaled += [[value / size for value in row] for row in group]
    return scaled


def entropy_bonus(logprobs: Tensor, entropies: Tensor) -> Tensor:
    """Advantages of tokens with which the policy gradient is, in expectation, that of the entropy of each token.

    That gradient is the mean of those of the log-probabilities, weighted by -logp; less the entropy, the weights have
    mean 0.

    Args:
        logprobs: [M] of each token, in the distribution from which it was drawn.
        entropies: [M] of these distributions, in nats.

    Returns:
        [M]
    """
    return -logprobs - entropies


def is_uncertain(entropies: Tensor, top_quantile: float) -> Tensor:
    """[M] True for the share of tokens whose distributions have the largest entropies [M], ties included.

    >>> import torch
    >>> is_uncertain(torch.tensor([0.1, 2.0, 0.5, 1.0]), 0.5)
    tensor([False,  True, False,  True])
    """
    num_others = len(entropies) - max(1, round(top_quantile * len(entropies)))
    return entropies >= entropies.sort().values[num_others]


def has_zero_std(rewards: Tensor, group_size: int) -> Tensor:
    """[B] True where all rewards of a group are the same; their mean and deviation are exact only up to rounding."""
    groups = rewards.view(-1, group_size)  # [B, G]
    return groups.amax(1) == groups.amin(1)
