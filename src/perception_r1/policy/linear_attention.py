"""Linear attention in which all completions of a prompt go on from its states: over packed rows, and token by token.

A gated delta net (arXiv 2412.06464) keeps one matrix per head, whatever the number of tokens. Each token lets it decay,
corrects what it holds under the token's key, and reads it with the token's query; queries, keys and values have passed
through a short causal convolution. So what completions need of their prompt is that matrix behind its last token, and
the last inputs of the convolution.

Legend: T packed tokens, C channels and W width of the convolution, V value heads, D_k and D_v sizes of keys and values;
in a bucket of `policy/packing.py`: n prompts of P tokens, G completions each, L longest completion input. In decoding:
B prompts, S rows of each.
"""

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.models.qwen3_5.modeling_qwen3_5 import causal_conv1d_fn, torch_chunk_gated_delta_rule

from perception_r1.policy.packing import LengthBucket, Packing
from perception_r1.policy.precision import at_least_fp32, autocast_device
from perception_r1.policy.prompt_states import LayerStates, LinearStates


def share_states(network: Any) -> None:
    """Let the layers of linear attention of a language model share the states of prompts, where a packing comes in.

    Without one they compute as in transformers.
    """
    for layer in network.layers:
        if hasattr(layer, "linear_attn"):
            layer.linear_attn.forward = partial(shared_prompt_linear_attention, layer.linear_attn)


def shared_prompt_linear_attention(
    module: Any, hidden_states: Tensor, *, packing: Packing | None = None, **kwargs: Any
) -> Tensor:
    """Each prompt is read once; each completion is read from the states of its prompt on.

    Args:
        module: The gated delta net of Qwen3.5 in transformers.
        hidden_states: [1, T, H].
        packing: The layout of the row; None for an ordinary batch.
        **kwargs: What the module itself takes; unused with a packing, which says it all.

    Returns:
        [1, T, H].
    """
    if packing is None:
        plain: Tensor = type(module).forward(module, hidden_states, **kwargs)
        return plain
    row = hidden_states[0]
    mixed = module.in_proj_qkv(row)  # [T, C]
    decay, rate = gates(module, module.in_proj_a(row), module.in_proj_b(row))  # [T, V] each
    states: list[LayerStates] = []
    prompts, completions = [], []
    for number, bucket in enumerate(packing.buckets):
        if packing.known is None:
            of_prompts = (_of_prompts(tensor, bucket) for tensor in (mixed, decay, rate))
            read, bucket_states = _read(module, None, *of_prompts)
            prompts.append(read.flatten(0, 1))  # [n*P, V, D_v]
        else:
            bucket_states = cast(LinearStates, packing.known[module.layer_idx][number])
        states.append(bucket_states)
        if len(bucket.rows):
            completions.append(_read_completions(module, bucket_states, (mixed, decay, rate), bucket))
    packing.record(module, states)
    read = torch.cat(prompts + completions)  # [T, V, D_v]
    gate = module.in_proj_z(row).view_as(read)
    normed = module.norm(read.flatten(0, 1), gate.flatten(0, 1)).view(len(row), -1)
    found: Tensor = module.out_proj(normed)[None]
    return found


def gates(module: Any, decay: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of what is left of a state, in at least fp32, and the share of it that is corrected; [..., V] each."""
    dtype = at_least_fp32(decay.dtype)
    left = -module.A_log.to(dtype).exp() * F.softplus(decay.to(dtype) + module.dt_bias)
    return left, rate.sigmoid()


def split_heads(module: Any, convolved: Tensor) -> Sequence[Tensor]:
    """Queries and keys [..., V, D_k] and values [..., V, D_v] from [..., C]; heads of keys stand for several values."""
    sizes = module.head_k_dim, module.head_k_dim, module.head_v_dim
    parts = convolved.split([module.key_dim, module.key_dim, module.value_dim], -1)
    heads = [part.unflatten(-1, (-1, size)) for part, size in zip(parts, sizes, strict=True)]
    times = module.num_v_heads // module.num_k_heads
    return heads if times == 1 else [*(head.repeat_interleave(times, -2) for head in heads[:2]), heads[2]]


def next_token_linear_attention(
    module: Any, states: LinearStates, mixed: Tensor, decay: Tensor, rate: Tensor
) -> Tensor:
    """Read the next token of each row; the states change in place.

    Args:
        module: The gated delta net.
        states: Of the rows, [B, S, ...].
        mixed: [B, S, C] inputs of the convolution.
        decay: [B, S, V] as in `gates`.
        rate: [B, S, V].

    Returns:
        [B, S, V, D_v].
    """
    inputs = torch.cat([states.inputs, mixed[..., None]], -1)  # [B, S, C, W]
    states.inputs.copy_(inputs[..., 1:])
    recurrent = states.recurrent
    weight = module.conv1d.weight[:, 0].to(recurrent.dtype)  # [C, W]
    convolved = ACT2FN[module.activation]((inputs * weight).sum(-1).to(mixed.dtype))
    query, key, value = (head.to(recurrent.dtype) for head in split_heads(module, convolved))
    query, key = (_normalise(head)[..., None, :] for head in (query, key))  # [B, S, V, 1, D_k]
    recurrent.mul_(decay.to(recurrent.dtype).exp()[..., None, None])
    missing = value[..., None, :] - key @ recurrent  # [B, S, V, 1, D_v]
    recurrent.add_(key.mT * (missing * rate[..., None, None]))
    read: Tensor = query @ recurrent * query.shape[-1] ** -0.5
    return read[..., 0, :].to(mixed.dtype)


def _read(
    module: Any, states: LinearStates | None, mixed: Tensor, decay: Tensor, rate: Tensor
) -> tuple[Tensor, LinearStates]:
    """What several sequences of equal length read, [n, L, V, D_v], and their states behind the last token.

    Args:
        module: The gated delta net.
        states: Those behind what came before; None: nothing came before.
        mixed: [n, L, C] inputs of the convolution.
        decay: [n, L, V] as in `gates`.
        rate: [n, L, V].
    """
    num_before, inputs = module.conv_kernel_size - 1, mixed.transpose(1, 2)  # [n, C, L]
    inputs = F.pad(inputs, (num_before, 0)) if states is None else torch.cat([states.inputs, inputs], -1)
    convolution = module.conv1d
    convolve, rule = _kernel(causal_conv1d_fn, mixed), _kernel(torch_chunk_gated_delta_rule, mixed)
    convolved = convolve(inputs, convolution.weight[:, 0], convolution.bias, activation=module.activation)
    query, key, value = split_heads(module, convolved[..., num_before:].transpose(1, 2))
    with torch.autocast(autocast_device(mixed.device), enabled=False):  # a state is the sum of all tokens
        read, recurrent = rule(
            query,
            key,
            value,
            g=decay,
            beta=rate,
            initial_state=None if states is None else states.recurrent,
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
    return read, LinearStates(recurrent, inputs[..., -num_before:].clone())


def _kernel(function: Callable[..., Any], tensor: Tensor) -> Callable[..., Any]:
    """On CUDA the kernel that transformers has found for a function (flash-linear-attention, causal-conv1d), if any."""
    return function if tensor.is_cuda else inspect.unwrap(function)


def _of_prompts(tensor: Tensor, bucket: LengthBucket) -> Tensor:
    """[n, P, ...] from [T, ...]."""
    span = tensor[bucket.start : bucket.start + bucket.num_prompts * bucket.length]
    return span.view(bucket.num_prompts, bucket.length, *span.shape[1:])


def _read_completions(
    module: Any, states: LinearStates, row: tuple[Tensor, Tensor, Tensor], bucket: LengthBucket
) -> Tensor:
    """[inputs of the bucket, V, D_v]: each completion goes on from the states of its prompt."""
    size = bucket.num_prompts * bucket.group_size
    # Filling stands behind every real token of its completion, so nothing real is read after it.
    own = (tensor.index_select(0, bucket.rows).unflatten(0, (size, -1)) for tensor in row)
    shared = (tensor[:, None].expand(-1, bucket.group_size, *tensor.shape[1:]).flatten(0, 1) for tensor in states)
    read, _ = _read(module, LinearStates(*shared), *own)
    rows: Tensor = read.flatten(0, 1)  # [n*G*L, V, D_v]
    return rows if bucket.inputs is None else rows.index_select(0, bucket.inputs)


def _normalise(head: Tensor) -> Tensor:
    """Of length one, as in the gated delta rule of transformers."""
    return head * torch.rsqrt((head * head).sum(-1, keepdim=True) + 1e-6)
