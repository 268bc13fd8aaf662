"""Groups that are split into several micro-batches: their prompt is computed once, forward and backward.

The first part computes the prompt. All parts learn from copies of what the language model has computed of it, and
collect gradients there; after the last part these flow back through the prompt. Memory holds the prompt's activations
all the while, and those of one part of its completions (arXiv 2606.01143).
"""

from collections.abc import Iterator

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
        known: All prompts of the step, computed already; then groups are whole.
        in_one_pass: The prompt's backward pass is that of the last part too, as it must be where devices exchange
            gradients in the last pass, for which each weight has to take part in it. That takes the memory of all
            gradients once more: what prompt and completions give is added up before it is added to the rest.
    """

    def __init__(self, policy: Policy, *, known: PromptStates | None = None, in_one_pass: bool = False) -> None:
        self._policy = policy
        self._known = known
        self._in_one_pass = in_one_pass
        self._states: PromptStates | None = None
        self._copy: PromptStates | None = None

    def states(self, prompts: PromptBatch, micro_batch: MicroBatch) -> PromptStates | None:
        """For a micro-batch's passes over its completions; None where it holds whole groups and computes their prompts.

        Args:
            prompts: Those of the micro-batch.
            micro_batch: The parts of a group come one after another.
        """
        if micro_batch.num_parts == 1:
            return None if self._known is None else self._known.select(micro_batch.prompts)
        if micro_batch.part == 0 or self._states is None:
            self._states = self._policy.prompt_states(prompts)
            self._copy = self._states.copy() if torch.is_grad_enabled() else self._states
        return self._states if micro_batch.is_last_part and self._in_one_pass else self._copy

    def losses(self, loss: Tensor, micro_batch: MicroBatch) -> Iterator[Tensor]:
        """What goes backward for a micro-batch, one after another: its loss, and after the last part the prompt's pull.

        The pull has the value 0, and the gradient that the parts have collected.
        """
        is_over = micro_batch.num_parts > 1 and micro_batch.is_last_part
        if is_over and self._in_one_pass:
            yield loss + self._pull()
            return
        yield loss
        if is_over:
            yield self._pull()

    def _pull(self) -> Tensor:
        assert self._states is not None
        assert self._copy is not None
        pairs = zip(self._states.tensors(), self._copy.tensors(), strict=True)
        pulls = [(states * copy.grad).sum() for states, copy in pairs if copy.grad is not None]
        self._states = self._copy = None
        total = torch.stack(pulls).sum()
        return total - total.detach()
