"""Log-probabilities of completions: the seam between the algorithm and the engine.

This is the plain way: the prompt is repeated for each of its completions, in one padded batch.

Legend: B prompts, G completions per prompt, P prompt tokens, T completion tokens (longest), V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.forward import embed_prompts, head_logits


def completion_logprobs(
    model: nn.Module, prompts: PromptBatch, completions: Sequence[Tensor], *, banned: Tensor, temperature: float
) -> Tensor:
    """Log-probability of every completion token, as the sampler would have drawn it.

    Args:
        model: A Qwen-VL causal model.
        prompts: B prompts.
        completions: B*G token id tensors, the G completions of a prompt after one another.
        banned: Ids of tokens that are never written.
        temperature: The sampling temperature.

    Returns:
        [B*G, T], zero behind the end of a completion.

    Raises:
        ValueError: The completions cannot be divided evenly among the prompts.
    """
    if len(completions) % len(prompts):
        raise ValueError(f"{len(completions)} completions cannot be divided evenly among {len(prompts)} prompts.")
    group_size = len(completions) // len(prompts)
    tokens = pad_sequence(list(completions), batch_first=True)  # [B*G, T]
    lengths = torch.tensor([len(completion) for completion in completions], device=tokens.device)
    is_token = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]  # [B*G, T]

    embedded = embed_prompts(model, prompts)
    inputs = tokens[:, :-1]  # the last token is predicted, never read
    steps = torch.arange(inputs.shape[1], device=tokens.device)
    next_position = embedded.next_position.repeat_interleave(group_size)
    answer_positions = (next_position[:, None] + steps).expand(3, -1, -1)  # [3, B*G, T-1]
    hidden = model.model.language_model(
        inputs_embeds=torch.cat(
            [
                embedded.inputs_embeds.repeat_interleave(group_size, 0),
                model.model.get_input_embeddings()(inputs),
            ],
            1,
        ),
        position_ids=torch.cat([embedded.position_ids.repeat_interleave(group_size, 1), answer_positions], 2),
        attention_mask=_mask(embedded.attention_mask, is_token, group_size),
        use_cache=False,
        **_repeat_extra(embedded.extra, group_size, inputs.shape[1]),
    ).last_hidden_state
    prompt_length = embedded.inputs_embeds.shape[1]
    rows = hidden[:, prompt_length - 1 :][is_token]  # [tokens, H]: only rows that predict a completion token
    logits = head_logits(model, rows, banned=banned, temperature=temperature)
    picked = logits.gather(-1, tokens[is_token][:, None])[:, 0] - logits.logsumexp(-1)
    return picked.new_zeros(tokens.shape).masked_scatter(is_token, picked)


def _mask(prompt_mask: Tensor, is_token: Tensor, group_size: int) -> Tensor | None:
    """[B*G, P+T-1] padding mask, or None where causal attention alone is right.

    Padding behind a completion is never seen by a token before it, so only padded prompts need a mask.
    """
    if bool(prompt_mask.all()):
        return None
    return torch.cat([prompt_mask.repeat_interleave(group_size, 0), is_token[:, :-1].to(prompt_mask.dtype)], 1)


def _repeat_extra(extra: dict, group_size: int, num_steps: int) -> dict:
    """Qwen3-VL: the image features of the first layers, repeated as the prompts are."""
    if not extra:
        return {}
    where = extra["visual_pos_masks"]  # [B, P]
    counts = where.sum(1).tolist()
    repeated = [
        torch.cat([part.repeat(group_size, 1) for part in features.split(counts)])
        for features in extra["deepstack_visual_embeds"]
    ]
    tail = where.new_zeros(len(where) * group_size, num_steps)
    return {
        "visual_pos_masks": torch.cat([where.repeat_interleave(group_size, 0), tail], 1),
        "deepstack_visual_embeds": repeated,
    }
