"""Log-probabilities of completions: each prompt is computed once, its completions attend to it.

Rows without padding: all prompts one after another, then all completions, each without its last token, which is
predicted but never read. Only the rows that predict a completion token reach the vocabulary head.

Legend: B prompts, G completions per prompt, N = B*G completions, P prompt tokens, T completion tokens (longest).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from perception_r1.policy.attention import Group, Packing
from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.forward import EmbeddedPrompts, QwenVL, embed_prompts, head_logits

_HEAD_ROWS = 2048
"""Rows of logits held at once in training; more are recomputed in backward. Below this chunking only costs time."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Layout:
    """Places in the packed row.

    Attributes:
        packing: For the attention.
        steps: [tokens] position of each completion input behind its prompt: 0, 1, 2 ...
        owners: [tokens] prompt to which each completion input belongs.
        predictors: [targets] row whose hidden state predicts each completion token, in the order of the completions.
    """

    packing: Packing
    steps: Tensor
    owners: Tensor
    predictors: Tensor


def completion_logprobs(
    model: QwenVL, prompts: PromptBatch, completions: Sequence[Tensor], *, banned: Tensor, temperature: float
) -> Tensor:
    """Log-probability of every completion token, as the sampler would have drawn it.

    Args:
        model: A Qwen-VL causal model whose language model uses `policy/attention.py`.
        prompts: B prompts.
        completions: N token id tensors, the G completions of a prompt after one another, none empty.
        banned: Ids of tokens that are never written.
        temperature: The sampling temperature.

    Returns:
        [N, T], zero behind the end of a completion.

    Raises:
        ValueError: The completions cannot be divided evenly among the prompts.
    """
    if len(completions) % len(prompts):
        raise ValueError(f"{len(completions)} completions cannot be divided evenly among {len(prompts)} prompts.")
    embedded = embed_prompts(model, prompts)
    lengths = [len(completion) for completion in completions]
    layout = _lay_out(prompts, lengths)
    hidden = model.model.language_model(
        attention_mask=None,
        use_cache=False,
        packing=layout.packing,
        **_packed_inputs(model, embedded, completions, layout),
    ).last_hidden_state[0]
    targets = torch.cat(list(completions))
    picked = _target_logprobs(model, hidden[layout.predictors], targets, banned, temperature)
    return pad_sequence(list(picked.split(lengths)), batch_first=True)


def _lay_out(prompts: PromptBatch, lengths: Sequence[int]) -> _Layout:
    device = prompts.input_ids.device
    group_size = len(lengths) // len(prompts)
    ends = prompts.attention_mask.sum(1).cumsum(0).tolist()
    place = ends[-1]  # the next free place in the row
    groups, steps, owners, predictors = [], [], [], []
    for index, end in enumerate(ends):
        inputs = [length - 1 for length in lengths[index * group_size : (index + 1) * group_size]]
        step = torch.arange(max(inputs))
        starts = torch.tensor([place + sum(inputs[:g]) for g in range(group_size)])[:, None]
        is_input = step < torch.tensor(inputs)[:, None]  # [G, C]
        rows = torch.where(is_input, starts + step, 0)
        groups.append(
            Group(start=ends[index - 1] if index else 0, end=end, rows=rows.to(device), is_input=is_input.to(device))
        )
        steps += [step[:count] for count in inputs]
        owners += [index] * sum(inputs)
        for start, count in zip(starts[:, 0].tolist(), inputs, strict=True):
            predictors += [end - 1, *range(start, start + count)]
        place += sum(inputs)
    return _Layout(
        packing=Packing(groups=tuple(groups)),
        steps=torch.cat(steps).to(device),
        owners=torch.tensor(owners, dtype=torch.long, device=device),
        predictors=torch.tensor(predictors, device=device),
    )


def _packed_inputs(
    model: QwenVL, embedded: EmbeddedPrompts, completions: Sequence[Tensor], layout: _Layout
) -> dict[str, Any]:
    """Embeddings [1, T, H], positions [3, 1, T] and what else the family's language model wants."""
    is_token = embedded.attention_mask.bool()
    read = torch.cat([completion[:-1] for completion in completions])
    embeds = torch.cat([embedded.inputs_embeds[is_token], model.model.get_input_embeddings()(read)])
    answer_positions = embedded.next_position[layout.owners] + layout.steps
    positions = torch.cat([embedded.position_ids[:, is_token], answer_positions.expand(3, -1)], 1)
    inputs = {"inputs_embeds": embeds[None], "position_ids": positions[:, None]}
    if embedded.extra:
        is_image = embedded.extra["visual_pos_masks"][is_token]
        is_image = torch.cat([is_image, is_image.new_zeros(len(read))])[None]
        return inputs | embedded.extra | {"visual_pos_masks": is_image}
    return inputs


def _target_logprobs(model: QwenVL, hidden: Tensor, targets: Tensor, banned: Tensor, temperature: float) -> Tensor:
    """[targets] log-probabilities from [targets, H] hidden states; long ones in chunks recomputed in backward."""

    def chunk_logprobs(rows: Tensor, chosen: Tensor) -> Tensor:
        logits = head_logits(model, rows, banned=banned, temperature=temperature)
        return logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)

    if len(targets) <= _HEAD_ROWS:
        return chunk_logprobs(hidden, targets)
    chunks = zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
    return torch.cat([checkpoint(chunk_logprobs, rows, chosen, use_reentrant=False) for rows, chosen in chunks])
