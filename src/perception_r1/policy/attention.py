"""Attention in which all completions of a prompt share its keys and values: over packed rows, and token by token.

`shared_prompt_attention` is registered with transformers under `NAME` for the language model. A call without a
`packing` argument goes to plain SDPA.

Legend: T packed tokens, H heads, K key-value heads, D head size; in a bucket of `policy/packing.py`: n prompts of P
tokens, G completions each, C longest completion input. In decoding: B prompts, S rows of each, W written tokens.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from perception_r1.policy.packing import LengthBucket, Packing
from perception_r1.policy.prompt_states import KeysAndValues, LayerStates

NAME = "shared_prompt"


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
        packing: The layout of the row; None for an ordinary batch.
        **kwargs: Passed on to SDPA.

    Returns:
        [1, T, H, D] and no weights.
    """
    if packing is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    query, key, value = _autocast(query, key, value)
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [T, heads, D]
    options = {"scale": scaling, "dropout_p": dropout}
    states: list[LayerStates] = []
    prompts, completions = [], []
    for number, bucket in enumerate(packing.buckets):
        if packing.known is None:
            prompt_query, prompt_key, prompt_value = (_of_prompts(tensor, bucket) for tensor in (query, key, value))
            attended = _attend(prompt_query, prompt_key, prompt_value, is_causal=True, **options)
            prompts.append(attended.transpose(1, 2).flatten(0, 1))  # [n*P, H, D]
        else:
            prompt_key, prompt_value = packing.known[cast(int, module.layer_idx)][number]
        states.append(KeysAndValues(prompt_key, prompt_value))
        if len(bucket.rows):
            completions.append(_attend_completions(query, key, value, prompt_key, prompt_value, bucket, options))
    packing.record(module, states)
    return torch.cat(prompts + completions)[None], None


def _autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """In the type to which SDPA would cast them, before they are copied for every completion."""
    kind = tensors[0].device.type
    is_on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    if not is_on or tensors[0].dtype == torch.float64:
        return tensors
    return [tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors]


def _of_prompts(tensor: Tensor, bucket: LengthBucket) -> Tensor:
    """[n, heads, P, D] from [T, heads, D]."""
    span = tensor[bucket.start : bucket.start + bucket.num_prompts * bucket.length]
    return span.view(bucket.num_prompts, bucket.length, *span.shape[1:]).transpose(1, 2)


def _attend_completions(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prompt_key: Tensor,
    prompt_value: Tensor,
    bucket: LengthBucket,
    options: dict[str, Any],
) -> Tensor:
    """[inputs of the bucket, H, D]: each completion sees its prompt and, behind it, itself."""
    size = bucket.num_prompts * bucket.group_size
    steps = len(bucket.rows) // size
    own = [tensor.index_select(0, bucket.rows).unflatten(0, (size, steps)) for tensor in (query, key, value)]

    def behind_prompt(prompt: Tensor, completion: Tensor) -> Tensor:  # [n*G, K, P+C, D]
        shared = prompt[:, None].expand(-1, bucket.group_size, -1, -1, -1)
        mine = completion.transpose(1, 2).unflatten(0, (bucket.num_prompts, bucket.group_size))
        return torch.cat([shared, mine], 3).flatten(0, 1)

    # Filling stands behind every real token of its completion, so the causal triangle alone keeps it out of sight.
    width = bucket.length + steps
    sees = torch.ones(steps, width, dtype=torch.bool, device=query.device).tril(bucket.length)
    keys, values = behind_prompt(prompt_key, own[1]), behind_prompt(prompt_value, own[2])
    attended = _attend(own[0].transpose(1, 2), keys, values, attn_mask=sees, **options)
    rows = attended.transpose(1, 2).flatten(0, 1)  # [n*G*C, H, D]
    return rows if bucket.inputs is None else rows.index_select(0, bucket.inputs)


def _attend(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
    """SDPA with grouped key-value heads, repeated where a mask would rule the fast kernels of CUDA out."""
    times = query.shape[1] // key.shape[1]
    if times > 1 and not query.is_cpu and "attn_mask" in options:
        key, value, times = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1), 1
    return F.scaled_dot_product_attention(query, key, value, enable_gqa=times > 1, **options)


def next_token_attention(
    query: Tensor, prompt: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor], bias: Tensor | None
) -> Tensor:
    """One softmax over the prompt that all rows of a group share and over what each row has written itself.

    The prompt's keys and values are read once per group, not once per row.

    Args:
        query: [B, S, H, D], scaled.
        prompt: Keys and values [B, K, P, D].
        own: Keys and values [B, K, S, W, D].
        bias: [B, 1, 1, 1, P + W] added to the scores; None adds nothing.

    Returns:
        [B, S, H*D].
    """
    num_prompts, rows, heads, size = query.shape
    kv_heads = prompt[0].shape[1]
    # [B, K, S, H/K, D]: the heads that share keys and values stand together, and so do the rows that share a prompt
    query = query.view(num_prompts, rows, kv_heads, heads // kv_heads, size).transpose(1, 2).contiguous()
    to_prompt = query.flatten(2, 3) @ prompt[0].mT  # [B, K, S*H/K, P]
    scores = torch.cat([to_prompt.view(*query.shape[:-1], -1), query @ own[0].mT], -1)  # [B, K, S, H/K, P + W]
    weights = (scores if bias is None else scores + bias).softmax(-1)
    on_prompt, on_own = weights.split([prompt[0].shape[2], own[0].shape[3]], -1)
    attended: Tensor = (on_prompt.flatten(2, 3) @ prompt[1]).view(query.shape) + on_own @ own[1]
    return attended.transpose(1, 2).reshape(num_prompts, rows, heads * size)


AttentionInterface.register(NAME, shared_prompt_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # without it a padded batch would silently get no mask
