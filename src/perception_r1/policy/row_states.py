"""States of linear attention during a rollout: each row's own, for every token that it writes changes them.

Legend: B prompts, S rows of each.
"""

import torch
from torch import Tensor

from perception_r1.policy.precision import at_least_fp32
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.prompt_states import LinearStates


class RowStates:
    """Of each layer of linear attention, [B, S, ...]: a step changes them in place, as a captured CUDA graph wants.

    Args:
        prompts: Where the rows begin.
        num_rows: S.
        dtype: Of the inputs of convolutions.
    """

    def __init__(self, prompts: PromptCache, *, num_rows: int, dtype: torch.dtype) -> None:
        self._layers = {
            number: LinearStates(
                _room(states.recurrent, num_rows, at_least_fp32(dtype)), _room(states.inputs, num_rows, dtype)
            )
            for number, states in prompts.linear_states.items()
        }
        self.load(prompts)

    def __getitem__(self, layer: int) -> LinearStates:
        """Of a layer, to be changed."""
        return self._layers[layer]

    def tensors(self) -> list[Tensor]:
        """Of all layers."""
        return [tensor for states in self._layers.values() for tensor in states]

    def load(self, prompts: PromptCache) -> None:
        """Let the rows begin anew behind other prompts of the same number."""
        for number, states in self._layers.items():
            for rows, of_prompts in zip(states, prompts.linear_states[number], strict=True):
                rows.copy_(of_prompts[:, None].expand_as(rows))

    def select(self, prompts: Tensor, slots: Tensor) -> None:
        """Let go of all rows but those of prompts [B'] with the numbers [B', S'] among the rows of theirs."""
        for number, states in self._layers.items():
            self._layers[number] = LinearStates(*(rows[prompts[:, None], slots] for rows in states))


def _room(of_prompts: Tensor, num_rows: int, dtype: torch.dtype) -> Tensor:
    """[B, S, ...] of nothing yet, from [B, ...]."""
    return of_prompts.new_empty(len(of_prompts), num_rows, *of_prompts.shape[1:], dtype=dtype)
