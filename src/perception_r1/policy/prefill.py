"""Prefill: the keys and values of prompts, computed once each, from which any number of completions can be written.

Legend: B prompts, P prompt tokens (longest), K key-value heads, D head size, H hidden size.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.forward import QwenVL, argsort_by_length, embed_prompts, packed_forward
from perception_r1.policy.packing import pack


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptCache:
    """Prompts as the language model remembers them, in the order in which they were given.

    Attributes:
        keys: Of each layer [B, K, P, D], filled on the right.
        values: Of each layer [B, K, P, D], filled on the right.
        lengths: [B] tokens of each prompt.
        hidden: [B, H] last hidden state of the last token, which predicts the first completion token.
        next_position: [B] position of the first completion token.
    """

    keys: list[Tensor]
    values: list[Tensor]
    lengths: Tensor
    hidden: Tensor
    next_position: Tensor


@torch.no_grad()
def prefill(model: QwenVL, prompts: PromptBatch) -> PromptCache:
    """Run the prompts through the language model, in one row without padding; the model is in evaluation mode."""
    lengths = prompts.lengths
    order = argsort_by_length(lengths)
    device = prompts.input_ids.device
    packed = embed_prompts(model, prompts.select(order))
    packing = pack([lengths[prompt] for prompt in order], [], device)
    cache: Any = DynamicCache(config=model.config.get_text_config())
    hidden = packed_forward(model, packed, packing, cache=cache)

    sizes = torch.tensor(lengths)
    ends = torch.empty_like(sizes)
    ends[order] = sizes[order].cumsum(0)
    step = torch.arange(max(lengths))
    places = torch.where(step < sizes[:, None], (ends - sizes)[:, None] + step, 0).to(device)  # [B, P] in the row
    place_in_row = torch.empty_like(sizes)
    place_in_row[order] = torch.arange(len(order))

    def unpack(row: Tensor) -> Tensor:  # [1, K, tokens, D] to [B, K, P, D]
        return row[0].index_select(1, places.flatten()).unflatten(1, places.shape).transpose(0, 1).contiguous()

    keys, values = [], []
    for layer in cache.layers:
        keys.append(unpack(layer.keys))
        values.append(unpack(layer.values))
        layer.reset()  # frees the row
    return PromptCache(
        keys=keys,
        values=values,
        lengths=sizes.to(device),
        hidden=hidden[(ends - 1).to(device)],
        next_position=packed.next_position[place_in_row.to(device)],
    )
