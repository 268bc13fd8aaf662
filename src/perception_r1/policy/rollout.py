"""Sampling: one prefill per prompt, its cache repeated over the group, then token by token.

Exact sampling from the full softmax by inverse transform: token = first index whose cumulative probability exceeds a
uniform number. The numbers of a row depend on its seed alone, so a completion does not depend on its neighbours.

Legend: B prompts, G completions per prompt, N = B*G rows, T longest completion, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.forward import QwenVL, embed_prompts, head_logits


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How completions are written.

    Attributes:
        max_new_tokens: Longest completion, end token included.
        end_token_ids: Any of these ends a completion.
        banned: Ids of tokens that are never written.
        temperature: Above 0; ignored when greedy.
        is_greedy: Take the most probable token each time.
    """

    max_new_tokens: int
    end_token_ids: Tensor
    banned: Tensor
    temperature: float = 1.0
    is_greedy: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """Completions as they were written, the G completions of a prompt after one another.

    Attributes:
        completions: B*G tensors of token ids, the end token included where one was written.
        is_truncated: B*G flags: the length limit came before an end token.
        entropy: Mean entropy of the sampling distribution over all written tokens, in nats.
    """

    completions: list[Tensor]
    is_truncated: list[bool]
    entropy: float


@torch.no_grad()
def roll_out(
    model: QwenVL, prompts: PromptBatch, *, group_size: int, sampling: Sampling, seeds: Sequence[int]
) -> Rollout:
    """Write G completions of each prompt.

    Args:
        model: A Qwen-VL causal model.
        prompts: B prompts.
        group_size: G.
        sampling: Length, end tokens, temperature.
        seeds: B seeds, one per prompt.
    """
    uniforms = _uniforms(seeds, group_size, sampling, prompts.input_ids.device)  # [N, T]
    embedded = embed_prompts(model, prompts)
    cache = DynamicCache(config=model.config.get_text_config())
    hidden = model.model.language_model(
        inputs_embeds=embedded.inputs_embeds,
        position_ids=embedded.position_ids,
        attention_mask=embedded.attention_mask if prompts.is_padded else None,
        past_key_values=cache,
        use_cache=True,
        **embedded.extra,
    ).last_hidden_state[:, -1]
    if group_size > 1:
        cache.batch_repeat_interleave(group_size)
    hidden = hidden.repeat_interleave(group_size, 0)
    next_position = embedded.next_position.repeat_interleave(group_size)
    mask = embedded.attention_mask.repeat_interleave(group_size, 0) if prompts.is_padded else None

    tokens = torch.zeros(uniforms.shape, dtype=torch.long, device=hidden.device)  # [N, T]
    lengths = torch.zeros(len(tokens), dtype=torch.long, device=hidden.device)
    has_ended = torch.zeros(len(tokens), dtype=torch.bool, device=hidden.device)
    live = torch.arange(len(tokens), device=hidden.device)
    entropy = torch.zeros((), device=hidden.device)
    for step in range(sampling.max_new_tokens):
        logits = head_logits(model, hidden, banned=sampling.banned, temperature=sampling.temperature)
        chosen, step_entropy = _choose(logits, uniforms[live, step], sampling.is_greedy)
        tokens[live, step] = chosen
        lengths[live] += 1
        entropy += step_entropy
        ended = torch.isin(chosen, sampling.end_token_ids)
        has_ended[live] = ended
        if step + 1 == sampling.max_new_tokens or bool(ended.all()):
            break
        if bool(ended.any()):  # finished rows leave the cache
            going = (~ended).nonzero()[:, 0]
            cache.batch_select_indices(going)
            live, chosen, next_position = live[going], chosen[going], next_position[going]
            mask = mask[going] if mask is not None else None
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        hidden = model.model.language_model(
            inputs_embeds=model.model.get_input_embeddings()(chosen[:, None]),
            position_ids=(next_position + step)[None, :, None].expand(3, -1, -1),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]
    return Rollout(
        completions=[row[:length] for row, length in zip(tokens, lengths.tolist(), strict=True)],
        is_truncated=(~has_ended).tolist(),
        entropy=float(entropy / lengths.sum()),
    )


def _uniforms(seeds: Sequence[int], group_size: int, sampling: Sampling, device: torch.device) -> Tensor:
    """[N, T] numbers in [0, 1), a prompt's own from its own seed; drawn on the CPU so that devices agree."""
    shape = (group_size, sampling.max_new_tokens)
    if sampling.is_greedy:
        return torch.zeros(len(seeds) * group_size, sampling.max_new_tokens, device=device)
    rows = [torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in seeds]
    return torch.cat(rows).to(device)


def _choose(logits: Tensor, uniforms: Tensor, is_greedy: bool) -> tuple[Tensor, Tensor]:
    """Next tokens [N] from logits [N, V], and the summed entropy of the rows' distributions."""
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum()
    if is_greedy:
        return logits.argmax(-1), entropy
    cumulative = probs.double().cumsum(-1)
    threshold = uniforms[:, None] * cumulative[:, -1:]  # rounding may leave the last sum a hair off 1
    chosen = torch.searchsorted(cumulative, threshold, right=True)[:, 0]
    return chosen.clamp_max(logits.shape[-1] - 1), entropy
