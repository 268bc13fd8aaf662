"""Groups that are split into several micro-batches: their prompt is computed once, forward and backward.

The first part computes the prompt. All parts but the last learn from copies of what the language model has computed of
it and collect gradients there; in the last these flow back through the prompt, with those of its own completions.
Memory holds the prompt's activations all the while, and those of one part of its completions (arXiv 2606.01143).
"""

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.packing import MicroBatch
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import PromptStates


class SharedPrompt:
    """The prompt of a group that is split into several micro-batches.

    Args:
        policy: What computes it.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy
        self._states: PromptStates | None = None
        self._copy: PromptStates | None = None

    def states(self, prompts: PromptBatch, micro_batch: MicroBatch) -> PromptStates | None:
        """For a micro-batch's passes over its completions; None where it holds whole groups.

        Args:
            prompts: Those of the micro-batch.
            micro_batch: The parts of a group come one after another.
        """
        if micro_batch.num_parts == 1:
            return None
        if micro_batch.part == 0 or self._states is None:
            self._states = self._policy.prompt_states(prompts)
            self._copy = self._states.copy() if torch.is_grad_enabled() else self._states
        return self._states if micro_batch.is_last_part else self._copy

    def pull(self, micro_batch: MicroBatch) -> Tensor | float:
        """Added to the loss of a micro-batch, its gradient is what earlier parts have collected for the prompt."""
        if micro_batch.num_parts == 1 or not micro_batch.is_last_part or self._states is None or self._copy is None:
            return 0.0
        pairs = zip(self._states.tensors(), self._copy.tensors(), strict=True)
        pulls = [(states * copy.grad).sum() for states, copy in pairs if copy.grad is not None]
        self._states = self._copy = None
        total = torch.stack(pulls).sum()
        return total - total.detach()
