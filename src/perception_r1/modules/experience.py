"""What a batch of completions becomes before it is learnt from.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from perception_r1.grpo import ScaleRewards, reward_to_go_advantages
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.packing import MicroBatch
from perception_r1.policy.policy import Policy
from perception_r1.policy.rollout import Rollout
from perception_r1.scoring import ScoredCompletion, prefix_rewards
from perception_r1.task import AnyTask


@dataclass(frozen=True, kw_only=True, slots=True)
class Experience:
    """Scored completions, ready to be learnt from, possibly several times.

    Attributes:
        prompts: B prompts.
        completions: N token id tensors, the G completions of a prompt after one another.
        advantages: [N], or [N, T] where tokens have advantages of their own.
        weights: [N] weight of each token of a completion in the loss.
        sampled_logprobs: N tensors: of each token, as the sampler had them.
        micro_batches: What is computed at once; together they hold every completion from which something can be learnt.
    """

    prompts: PromptBatch
    completions: list[Tensor]
    advantages: Tensor
    weights: Tensor
    sampled_logprobs: list[Tensor]
    micro_batches: list[MicroBatch]

    def select(self, micro_batch: MicroBatch) -> tuple[PromptBatch, list[Tensor]]:
        """Prompts and completions of a micro-batch."""
        return self.prompts.select(micro_batch.prompts), [self.completions[row] for row in micro_batch.rows]


def box_advantages(
    task: AnyTask,
    policy: Policy,
    rollout: Rollout,
    scored_completions: Sequence[ScoredCompletion],
    *,
    group_size: int,
    scale: ScaleRewards,
    dtype: torch.dtype,
) -> Tensor:
    """[N, T] advantages of tokens, on the CPU: each has that of the box to which it belongs.

    Args:
        task: The task that scored.
        policy: The policy that wrote, for its codec and its tokens.
        rollout: N completions.
        scored_completions: The same, scored.
        group_size: G.
        scale: See `reward_to_go_advantages`.
        dtype: Of the advantages.
    """
    found = [prefix_rewards(task, policy.codec, scored) for scored in scored_completions]
    gained = [
        [*(reward for _, reward in prefixes), scored.score.reward]
        for prefixes, scored in zip(found, scored_completions, strict=True)
    ]
    rows = []
    advantages = reward_to_go_advantages(gained, group_size, scale=scale)
    for completion, prefixes, parts in zip(rollout.completions, found, advantages, strict=True):
        ends = torch.tensor([end for end, _ in prefixes[1:]])
        token_ends = torch.tensor(policy.processor.token_ends(completion))
        rows.append(torch.tensor(parts, dtype=dtype)[torch.searchsorted(ends, token_ends)])
    return pad_sequence(rows, batch_first=True)


def logprob_mismatch(rollout: Rollout, micro_batches: Sequence[MicroBatch], old_logprobs: Sequence[Tensor]) -> float:
    """Mean distance between the log-probabilities of the sampler and those of the first training pass.

    Rounding makes it, about 1e-6 in float32 and 1e-2 in bfloat16; more means that the two do not compute the same. The
    trained ones, `old_logprobs`, are [n, T] per micro-batch.
    """
    gaps = [
        (rollout.logprobs[row] - trained[: len(rollout.logprobs[row])]).abs()
        for micro_batch, logprobs in zip(micro_batches, old_logprobs, strict=True)
        for row, trained in zip(micro_batch.rows, logprobs, strict=True)
    ]
    return float(torch.cat(gaps).mean()) if gaps else 0.0
