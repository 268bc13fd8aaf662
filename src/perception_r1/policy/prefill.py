"""Prefill: what prompts leave in the layers, computed once each, from which any number of completions can be written.

Legend: B prompts, P prompt tokens (longest), K key-value heads, D head size, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch, move_together
from perception_r1.policy.families import VisionLanguageModel
from perception_r1.policy.forward import argsort_by_length, packed_forward
from perception_r1.policy.packing import pack
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.prompt_states import KeysAndValues, LayerStates, LinearStates


@torch.no_grad()
def prefill(model: VisionLanguageModel, prompts: PromptBatch) -> PromptCache:
    """Run the prompts through the language model, in one row without padding; the model is in evaluation mode."""
    device = model.model.get_input_embeddings().weight.device
    ordered = argsort_by_length(prompts.lengths)
    in_order = prompts.select(ordered)
    recorded: dict[int, list[LayerStates]] = {}
    packing = replace(pack(in_order.lengths, [], device), recorded=recorded)
    hidden = packed_forward(model, in_order, [], packing)

    ends = torch.tensor(in_order.lengths).cumsum(0)  # of each in the row
    order, last_indices = move_together([torch.tensor(ordered), ends - 1], device)
    keys_and_values: dict[int, KeysAndValues] = {}
    linear_states: dict[int, LinearStates] = {}
    for number in sorted(recorded):
        states = recorded.pop(number)  # the row is freed layer by layer
        if isinstance(states[0], KeysAndValues):
            keys, values = (_fill(parts, order) for parts in zip(*states, strict=True))
            keys_and_values[number] = KeysAndValues(keys, values)
        else:
            recurrent, inputs = (_put_back(torch.cat(parts), order) for parts in zip(*states, strict=True))
            linear_states[number] = LinearStates(recurrent, inputs)
    return PromptCache(
        keys_and_values=keys_and_values,
        linear_states=linear_states,
        lengths=tuple(prompts.lengths),
        input_ids=prompts.input_ids,
        hidden=_put_back(hidden.index_select(0, last_indices), order),
        next_positions=prompts.next_positions,
    )


def _put_back(rows: Tensor, order: Tensor) -> Tensor:
    """Rows [B, ...] of prompts that stand in an order, as these were given."""
    return torch.empty_like(rows).index_copy_(0, order, rows)


def _fill(parts: Sequence[Tensor], order: Tensor) -> Tensor:
    """[B, K, P, D] from buckets [n, K, tokens, D] whose prompts, one bucket after another, stand in an order."""
    longest = parts[-1]
    whole = longest.new_zeros(len(order), *longest.shape[1:])
    for part, numbers in zip(parts, order.split([len(part) for part in parts]), strict=True):
        whole[:, :, : part.shape[2]].index_copy_(0, numbers, part)
    return whole
