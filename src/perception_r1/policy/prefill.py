"""Prefill: what prompts leave in the layers, computed once each, from which any number of completions can be written.

Legend: B prompts, P prompt tokens (longest), K key-value heads, D head size, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch, argsort_by_length, to_device
from perception_r1.policy.families import VisionLanguageModel
from perception_r1.policy.forward import packed_forward
from perception_r1.policy.packing import pack
from perception_r1.policy.prompt_cache import PromptCache
from perception_r1.policy.prompt_states import KeysAndValues, LayerStates, LinearStates, PromptStates


def prompt_states(model: VisionLanguageModel, prompts: PromptBatch) -> PromptStates:
    """Run the prompts through the language model, in one row without padding; with gradient where that is on."""
    device = model.model.get_input_embeddings().weight.device
    order = argsort_by_length(prompts.lengths)
    in_order = prompts.select(order)
    recorded: dict[int, list[LayerStates]] = {}
    packing = replace(pack(in_order.lengths, [], device), recorded=recorded)
    hidden = packed_forward(model, in_order, [], packing)
    ends = torch.tensor(in_order.lengths).cumsum(0)  # of each in the row
    last = hidden.index_select(0, to_device(ends - 1, device))
    return PromptStates(order=order, lengths=in_order.lengths, layers=recorded, hidden=last)


@torch.no_grad()
def prefill(model: VisionLanguageModel, prompts: PromptBatch, states: PromptStates | None = None) -> PromptCache:
    """Prompts as decoding reads them; the model is in evaluation mode.

    Args:
        model: A causal model whose language model uses `policy/attention.py`.
        prompts: B prompts.
        states: Those of `prompt_states`, where the prompts have been computed already.
    """
    computed = prompt_states(model, prompts) if states is None else states
    layers, hidden = dict(computed.layers), computed.hidden.detach()
    order = to_device(torch.tensor(computed.order), hidden.device)
    del computed
    keys_and_values: dict[int, KeysAndValues] = {}
    linear_states: dict[int, LinearStates] = {}
    for number in sorted(layers):
        parts = layers.pop(number)  # where nobody else holds it, the row is freed layer by layer
        if isinstance(parts[0], KeysAndValues):
            keys, values = (_fill(each, order) for each in zip(*parts, strict=True))
            keys_and_values[number] = KeysAndValues(keys, values)
        else:
            recurrent, inputs = (_put_back(torch.cat(each), order) for each in zip(*parts, strict=True))
            linear_states[number] = LinearStates(recurrent, inputs)
    return PromptCache(
        keys_and_values=keys_and_values,
        linear_states=linear_states,
        lengths=tuple(prompts.lengths),
        input_ids=prompts.input_ids,
        hidden=_put_back(hidden, order),
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
