"""Attention over packed groups: a prompt is computed once and all its completions attend to it.

Registered with transformers under `NAME` for the language model. A call without a `packing` argument (prefill,
decoding) goes to plain SDPA.

Legend: T packed tokens, P tokens of a prompt, G its completions, C longest completion input, H heads, K key-value
heads, D head size.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "shared_prompt"


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Where a prompt and its completions lie in a packed row.

    Attributes:
        start: First token of the prompt.
        end: One behind the last token of the prompt.
        rows: [G, C] places of the completions' input tokens; any place where `is_input` is False.
        is_input: [G, C] True for input tokens, False behind a shorter completion.
    """

    start: int
    end: int
    rows: Tensor
    is_input: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Packing:
    """All groups of a packed row: the prompts first, then the completions, without padding."""

    groups: tuple[Group, ...]


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal within each prompt; a completion sees its whole prompt and itself up to the present token.

    Args:
        module: The attention layer.
        query: [1, H, T, D].
        key: [1, K, T, D].
        value: [1, K, T, D].
        attention_mask: Unused with a packing, which says it all.
        dropout: Of attention weights; zero in these families.
        scaling: Of the scores.
        packing: Where the groups lie; None for an ordinary batch.
        **kwargs: Passed on to SDPA.

    Returns:
        [1, T, H, D] and no weights.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    options: dict[str, Any] = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    prompts, completions = [], []
    for group in packing.groups:
        span = slice(group.start, group.end)
        prompt_key, prompt_value = key[:, :, span], value[:, :, span]  # [1, K, P, D]
        attended = F.scaled_dot_product_attention(
            query[:, :, span], prompt_key, prompt_value, is_causal=True, **options
        )
        prompts.append(attended[0].transpose(0, 1))  # [P, H, D]
        if group.rows.shape[1] == 0:
            continue
        size, steps = group.rows.shape
        own = [tensor[0, :, group.rows].transpose(0, 1) for tensor in (query, key, value)]  # [G, heads, C, D]
        keys = torch.cat([prompt_key.expand(size, -1, -1, -1), own[1]], 2)  # [G, K, P+C, D]
        values = torch.cat([prompt_value.expand(size, -1, -1, -1), own[2]], 2)
        # Padding stands behind every real token of its row, so the causal triangle alone keeps it out of sight.
        sees = torch.ones(steps, keys.shape[2], dtype=torch.bool, device=keys.device).tril(group.end - group.start)
        attended = F.scaled_dot_product_attention(own[0], keys, values, attn_mask=sees, **options)
        completions.append(attended.transpose(1, 2)[group.is_input])  # [inputs of the group, H, D]
    return torch.cat(prompts + completions)[None], None


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it a padded batch would silently get no mask
