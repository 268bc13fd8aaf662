"""The arithmetic of GRPO: tensors in, tensors out.

    advantage   A_i = (r_i - mean(r_group)) / (std(r_group) + 1e-4), std unbiased
    objective   min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) - beta * kl      per token
    ratio       exp(logp - logp_old)
    kl          exp(ref - logp) - (ref - logp) - 1                                          the k3 estimator

The loss is the negative objective, summed with the token weights of `token_weights`. Deviation from DeepSeekMath's
GRPO (arXiv 2402.03300): none for the loss "grpo"; "dapo" and "dr_grpo" follow arXiv 2503.14476 and 2503.20783.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

LossType = Literal["grpo", "dapo", "dr_grpo"]

_STD_FLOOR = 1e-4


def group_advantages(rewards: Tensor, group_size: int, *, scale: bool = True) -> Tensor:
    """How much better each completion is than its group.

    Args:
        rewards: [N] rewards, the G completions of a prompt after one another.
        group_size: G, at least 2.
        scale: Divide by the group's standard deviation.

    Returns:
        [N] advantages; zero throughout a group of equal rewards.

    Raises:
        ValueError: The group is too small, or the rewards cannot be grouped.

    >>> group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.5]), 2).round(decimals=3)
    tensor([ 0.7070, -0.7070,  0.0000,  0.0000])
    """
    if group_size < 2:
        raise ValueError(f"group_size is {group_size}; a completion is compared with its group, so use 2 or more.")
    if rewards.ndim != 1 or len(rewards) % group_size:
        raise ValueError(f"{tuple(rewards.shape)} rewards cannot be grouped by {group_size}.")
    groups = rewards.view(-1, group_size)  # [B, G]
    centred = groups - groups.mean(1, keepdim=True)
    if scale:
        centred = centred / (groups.std(1, keepdim=True) + _STD_FLOOR)
    return centred.masked_fill(has_zero_std(rewards, group_size)[:, None], 0.0).flatten()


def has_zero_std(rewards: Tensor, group_size: int) -> Tensor:
    """[B] True where all rewards of a group are the same; their mean and deviation are exact only up to rounding."""
    groups = rewards.view(-1, group_size)  # [B, G]
    return groups.amax(1) == groups.amin(1)


def token_weights(
    lengths: Tensor, *, loss_type: LossType, max_new_tokens: int, num_tokens: Tensor | None = None
) -> Tensor:
    """Weight of each completion's every token in the loss of a whole batch.

    The weights of a batch do not depend on how it is cut into micro-batches, so neither do its gradients.

    Args:
        lengths: [N] tokens of each completion.
        loss_type: "grpo": mean over a completion's tokens, then over completions; "dapo": mean over all tokens;
            "dr_grpo": sum over tokens divided by a constant, N * max_new_tokens.
        max_new_tokens: The constant of "dr_grpo".
        num_tokens: The number of tokens over which "dapo" averages; by default those of `lengths`. Where gradients are
            averaged over devices, the mean number per device makes it the mean over the tokens of all of them.

    Returns:
        [N] weights.
    """
    count = len(lengths)
    if loss_type == "grpo":
        return 1.0 / (lengths * count)
    ones = torch.ones_like(lengths, dtype=torch.float32)
    if loss_type == "dapo":
        return ones / (lengths.sum() if num_tokens is None else num_tokens)
    return ones / (count * max_new_tokens)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss and what is logged about it: sums over tokens, so that parts of a batch can be added.

    Attributes:
        loss: Scalar with gradient.
        kl_sum: Sum of the k3 estimates over all tokens.
        num_clipped: Number of tokens whose ratio was clipped.
    """

    loss: Tensor
    kl_sum: Tensor
    num_clipped: Tensor


def grpo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    reference_logprobs: Tensor | None,
    *,
    advantages: Tensor,
    weights: Tensor,
    is_token: Tensor,
    clip_eps_low: float,
    clip_eps_high: float,
    kl_coef: float,
) -> LossOutput:
    """The clipped objective with its KL penalty, as a loss.

    Args:
        logprobs: [N, T] of the policy, with gradient.
        old_logprobs: [N, T] of the policy that wrote the completions.
        reference_logprobs: [N, T] of the frozen reference; None when `kl_coef` is 0.
        advantages: [N].
        weights: [N] weight of each token of a completion.
        is_token: [N, T] True up to and including a completion's first end token.
        clip_eps_low: eps_low.
        clip_eps_high: eps_high.
        kl_coef: beta.
    """
    ratio = (logprobs - old_logprobs).exp()  # [N, T]
    gain = advantages[:, None]
    clipped_ratio = ratio.clamp(1 - clip_eps_low, 1 + clip_eps_high)
    objective = torch.minimum(ratio * gain, clipped_ratio * gain)
    kl = k3_kl(logprobs, reference_logprobs) if reference_logprobs is not None else torch.zeros_like(logprobs)
    per_token = kl_coef * kl - objective
    with torch.no_grad():
        is_clipped = (ratio * gain > clipped_ratio * gain) & is_token
    return LossOutput(
        loss=(per_token * weights[:, None]).masked_fill(~is_token, 0.0).sum(),
        kl_sum=kl.detach().masked_fill(~is_token, 0.0).sum(),
        num_clipped=is_clipped.sum(),
    )


def k3_kl(logprobs: Tensor, reference_logprobs: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(policy || reference) per token: unbiased and never negative.

    >>> k3_kl(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.])
    """
    difference = reference_logprobs - logprobs
    return difference.exp() - difference - 1
