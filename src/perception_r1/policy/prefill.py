"""Prefill: the keys and values of prompts, computed once each, from which any number of completions can be written.

Legend: B prompts, P prompt tokens (longest), K key-value heads, D head size, H hidden size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from perception_r1.policy.batch import PromptBatch, move_together
from perception_r1.policy.families import VisionLanguageModel
from perception_r1.policy.forward import argsort_by_length, packed_forward
from perception_r1.policy.packing import pack
from perception_r1.policy.prompt_cache import PromptCache


@torch.no_grad()
def prefill(model: VisionLanguageModel, prompts: PromptBatch) -> PromptCache:
    """Run the prompts through the language model, in one row without padding; the model is in evaluation mode."""
    device = model.model.get_input_embeddings().weight.device
    order = argsort_by_length(prompts.lengths)
    in_order = prompts.select(order)
    cache: Any = DynamicCache(config=model.config.get_text_config())
    hidden = packed_forward(model, in_order, [], pack(in_order.lengths, [], device), cache=cache)

    lengths = torch.tensor(prompts.lengths)
    ends = torch.empty_like(lengths)  # of each prompt in the row
    ends[order] = lengths[order].cumsum(0)
    step = torch.arange(max(prompts.lengths))
    indices = torch.where(step < lengths[:, None], (ends - lengths)[:, None] + step, 0)  # [B, P] in the row
    flat_indices, last_indices = move_together([indices.flatten(), ends - 1], device)

    def unpack(row: Tensor) -> Tensor:  # [1, K, tokens, D] to [B, K, P, D]
        return row[0].index_select(1, flat_indices).view(len(row[0]), *indices.shape, -1).transpose(0, 1).contiguous()

    keys, values = [], []
    for layer in cache.layers:
        keys.append(unpack(layer.keys))
        values.append(unpack(layer.values))
        layer.reset()  # frees the row
    return PromptCache(
        keys=keys,
        values=values,
        lengths=tuple(prompts.lengths),
        input_ids=prompts.input_ids,
        hidden=hidden.index_select(0, last_indices),
        next_positions=prompts.next_positions,
    )
