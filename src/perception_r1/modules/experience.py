"""What a batch of completions becomes before it is learnt from.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.packing import MicroBatch
from perception_r1.policy.prompt_states import PromptStates
from perception_r1.policy.rollout import Rollout


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
        states: What the rollout has computed of the prompts, for the first update; None: it computes them itself.
        num_empty_passes: Passes for which the other devices wait besides, see `PolicyModule.empty_pass`.
    """

    prompts: PromptBatch
    completions: list[Tensor]
    advantages: Tensor
    weights: Tensor
    sampled_logprobs: list[Tensor]
    micro_batches: list[MicroBatch]
    states: PromptStates | None = None
    num_empty_passes: int = 0

    def select(self, micro_batch: MicroBatch) -> tuple[PromptBatch, list[Tensor]]:
        """Prompts and completions of a micro-batch."""
        return self.prompts.select(micro_batch.prompts), [self.completions[row] for row in micro_batch.rows]


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
