"""Prompts whose completions are cut into several micro-batches: they are computed once, forward and backward.

They are the prompt of a group that exceeds a micro-batch, which its first part computes; or all those of a step, which
the rollout has computed. All parts learn from copies of what the language model has computed, and collect gradients
there; after the last part these flow back through the prompts. Memory holds the prompts' activations all the while, and
those of one part of the completions (arXiv 2606.01143).
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.packing import MicroBatch
from perception_r1.policy.policy import Policy
from perception_r1.policy.prompt_states import PromptStates


class SharedPrompts:
    """What the parts of a step share of their prompts.

    Args:
        policy: What computes them.
        known: All prompts of the step, computed already; None: groups that are split compute theirs.
        num_parts: Micro-batches of the step, which share what is known.
        in_one_pass: The prompts' backward pass is that of the last part too, as it must be where devices exchange
            gradients in the last pass, for which each weight has to take part in it. That takes the memory of all
            gradients once more: what prompts and completions give is added up before it is added to the rest.
    """

    def __init__(
        self, policy: Policy, *, known: PromptStates | None = None, num_parts: int = 1, in_one_pass: bool = False
    ) -> None:
        self._policy = policy
        self._known = known
        self._part, self._num_parts = 0, num_parts
        self._in_one_pass = in_one_pass
        self._states: PromptStates | None = None
        self._copy: PromptStates | None = None

    def states(self, prompts: PromptBatch, micro_batch: MicroBatch) -> PromptStates | None:
        """For a micro-batch's passes over its completions; None where it computes its prompts itself.

        Args:
            prompts: Those of the micro-batch.
            micro_batch: They come one after another, and so do the parts of a group.
        """
        part, num_parts = self._place(micro_batch)
        if num_parts == 1:
            return None if self._known is None else self._known.select(micro_batch.prompts)
        if part == 0 or self._states is None or self._copy is None:
            self._states = self._policy.prompt_states(prompts) if self._known is None else self._known
            self._copy = self._states.copy() if torch.is_grad_enabled() else self._states
        states = self._states if part + 1 == num_parts and self._in_one_pass else self._copy
        return states if self._known is None else states.select(micro_batch.prompts)

    def losses(self, loss: Tensor, micro_batch: MicroBatch) -> Iterator[Tensor]:
        """What goes backward for a micro-batch, one after another: its loss, and after the last part the prompts' pull.

        The pull has the value 0, and the gradient that the parts have collected.
        """
        part, num_parts = self._place(micro_batch)
        self._part += 1
        is_over = 1 < num_parts == part + 1
        if is_over and self._in_one_pass:
            yield loss + self._pull()
            return
        yield loss
        if is_over:
            yield self._pull()

    def _place(self, micro_batch: MicroBatch) -> tuple[int, int]:
        """Which part of how many that share prompts a micro-batch is."""
        if self._known is None:
            return micro_batch.part, micro_batch.num_parts
        return self._part, self._num_parts

    def _pull(self) -> Tensor:
        assert self._states is not None
        assert self._copy is not None
        pairs = zip(self._states.tensors(), self._copy.tensors(), strict=True)
        pulls = [(states * copy.grad).sum() for states, copy in pairs if copy.grad is not None]
        self._states = self._copy = None
        total = torch.stack(pulls).sum()
        return total - total.detach()
