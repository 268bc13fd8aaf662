"""The loss of GRPO: tensors in, tensors out.

    objective   min(ratio * A, clip(ratio, 1 - eps_low, 1 + eps_high) * A) - beta * kl      per token
    ratio       exp(logp - logp_old)
    kl          exp(ref - logp) - (ref - logp) - 1                                          k3, see `kl_estimate`

The loss is the negative objective, summed with the token weights of `token_weights`. Deviation from DeepSeekMath's
GRPO (arXiv 2402.03300): none for the loss "grpo"; "dapo" and "dr_grpo" follow arXiv 2503.14476 and 2503.20783.

There are also other objectives, and ratios of whole completions (`grpo_loss`: CISPO, SAPO, GSPO).

Legend: N completions, T completion tokens (longest).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from perception_r1.errors import UserError

LossType = Literal["grpo", "dapo", "dr_grpo"]
Objective = Literal["clip", "cispo", "sapo"]
ImportanceSamplingLevel = Literal["token", "sequence"]
KLEstimator = Literal["k2", "k3"]
SamplerCorrection = Literal["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]


def token_weights(
    lengths: Tensor, *, loss_type: LossType, max_new_tokens: int, num_tokens: Tensor | None = None
) -> Tensor:
    """Weight of each token of each completion in the loss of a whole batch.

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


def sampler_weights(
    old_logprobs: Tensor, sampled_logprobs: Tensor, is_token: Tensor, *, correction: SamplerCorrection, cap: float
) -> Tensor:
    """Importance weights of the policy against the engine that wrote the completions, where the two compute otherwise.

    A weight is the ratio of their probabilities, of a token or of a whole completion; beyond the cap it is the cap
    (truncate, Ionides 2008) or 0 (mask).

    Args:
        old_logprobs: [N, T] of the policy before the update, as training computes them.
        sampled_logprobs: [N, T] as the engine had them.
        is_token: [N, T] True up to and including a completion's first end token.
        correction: What has a ratio, and what becomes of one beyond the cap.
        cap: The largest weight.

    Returns:
        [N, T], or [N, 1] for completions.
    """
    log_ratio = (old_logprobs - sampled_logprobs).masked_fill(~is_token, 0.0)
    if correction.startswith("sequence"):
        log_ratio = log_ratio.sum(1, keepdim=True)
    ratio = log_ratio.exp()
    return ratio.clamp(max=cap) if correction.endswith("truncate") else ratio.masked_fill(ratio > cap, 0.0)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What the objective and its penalty are.

    clip    min(ratio * A, clip(ratio) * A)
    cispo   stop_gradient(clip(ratio)) * A * logp                   arXiv 2506.13585: every token keeps its gradient
    sapo    4 / tau * sigmoid(tau * (ratio - 1)) * A                arXiv 2511.20347: a gate in place of the clip

    Attributes:
        clip_eps_low: eps_low; 1 is no bound below, as CISPO has it.
        clip_eps_high: eps_high.
        kl_coef: beta.
        kl_estimator: See `kl_estimate`.
        kl_bias_correction: The estimates are multiplied by the ratio.
        objective: One of the above.
        importance_sampling_level: Ratios are those of tokens, or their geometric mean over the completion for all of
            its tokens: with the clip that is GSPO (arXiv 2507.18071), whose eps are some ten thousandths, and where
            tokens have advantages of their own its GSPO-token.
        sapo_temperature_pos: tau where the advantage is positive.
        sapo_temperature_neg: tau elsewhere.

    Raises:
        UserError: A value is out of range.
    """

    clip_eps_low: float = 0.2
    clip_eps_high: float = 0.2
    kl_coef: float = 0.0
    kl_estimator: KLEstimator = "k3"
    kl_bias_correction: bool = False
    objective: Objective = "clip"
    importance_sampling_level: ImportanceSamplingLevel = "token"
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self) -> None:
        if self.kl_coef < 0 or not 0 <= self.clip_eps_low <= 1 or self.clip_eps_high < 0:
            raise UserError("kl_coef and clip_eps_high must not be negative, and clip_eps_low must lie in [0, 1].")
        if self.kl_bias_correction and self.kl_estimator == "k2":
            raise UserError("kl_bias_correction is of the kl_estimator k3; the gradient of k2 needs none.")
        if not (self.sapo_temperature_pos > 0 and self.sapo_temperature_neg > 0):
            raise UserError("sapo_temperature_pos and sapo_temperature_neg must be above 0.")


@dataclass(frozen=True, kw_only=True, slots=True)
class LossOutput:
    """A loss and what is logged about it: sums over tokens, so that parts of a batch can be added.

    Attributes:
        loss: Scalar with gradient.
        kl_sum: Sum of the estimates over all tokens.
        num_clipped: Number of tokens whose ratio was clipped; with SAPO, which has no clip, none.
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
    config: LossConfig,
    importance_weights: Tensor | None = None,
) -> LossOutput:
    """The objective with its KL penalty, as a loss.

    Args:
        logprobs: [N, T] of the policy, with gradient.
        old_logprobs: [N, T] of the policy that wrote the completions.
        reference_logprobs: [N, T] of the frozen reference; None when `kl_coef` is 0.
        advantages: [N], or [N, T or more] where tokens have advantages of their own.
        weights: [N] weight of each token of a completion.
        is_token: [N, T] True up to and including a completion's first end token.
        config: What they are.
        importance_weights: [N, T] or [N, 1] those of `sampler_weights`, by which the objective is multiplied.
    """
    log_ratio = logprobs - old_logprobs  # [N, T]
    if config.importance_sampling_level == "sequence":
        log_ratio = log_ratio.masked_fill(~is_token, 0.0).sum(1, keepdim=True) / is_token.sum(1, keepdim=True)  # [N, 1]
        if advantages.ndim == 2:  # the same ratio, but each token's own gradient: GSPO-token
            log_ratio = log_ratio.detach() + logprobs - logprobs.detach()  # [N, T]
    ratio, gain = log_ratio.exp(), advantages[:, : logprobs.shape[1]] if advantages.ndim == 2 else advantages[:, None]
    clipped_ratio = ratio.clamp(1 - config.clip_eps_low, 1 + config.clip_eps_high)
    if config.objective == "clip":
        value = torch.minimum(ratio * gain, clipped_ratio * gain)
        is_clipped = ratio * gain > clipped_ratio * gain
    elif config.objective == "cispo":
        value = clipped_ratio.detach() * gain * logprobs
        is_clipped = ratio != clipped_ratio
    else:
        positive, other = config.sapo_temperature_pos, config.sapo_temperature_neg
        temperature = other + (positive - other) * (gain > 0).to(gain.dtype)
        value = 4 / temperature * torch.sigmoid(temperature * (ratio - 1)) * gain
        is_clipped = torch.zeros_like(ratio, dtype=torch.bool)
    kl = torch.zeros_like(logprobs)
    if reference_logprobs is not None:
        kl = kl_estimate(logprobs, reference_logprobs, config.kl_estimator)
        if config.kl_bias_correction:
            kl = kl * (logprobs - old_logprobs).exp()
    per_token = config.kl_coef * kl - (value if importance_weights is None else importance_weights * value)
    return LossOutput(
        loss=(per_token * weights[:, None]).masked_fill(~is_token, 0.0).sum(),
        kl_sum=kl.detach().masked_fill(~is_token, 0.0).sum(),
        num_clipped=(is_clipped & is_token).sum(),
    )


def kl_estimate(logprobs: Tensor, reference_logprobs: Tensor, estimator: KLEstimator = "k3") -> Tensor:
    """Schulman's estimates of KL(policy || reference) per token from what the policy wrote; none is negative.

    k3      exp(ref - logp) - (ref - logp) - 1      its value is unbiased; its gradient is not that of this divergence
    k2      (ref - logp)^2 / 2                      its value is biased; its gradient is right for what was just written

    Multiplied by the ratio, k3 is right in both, also for what an older policy wrote (arXiv 2512.02556).

    >>> kl_estimate(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.])
    """
    difference = reference_logprobs - logprobs
    return difference.square() / 2 if estimator == "k2" else difference.exp() - difference - 1
