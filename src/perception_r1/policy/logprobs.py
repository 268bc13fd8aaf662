"""Log-probabilities of completions: each prompt is computed once, its completions attend to it.

Only the hidden states that predict a completion token reach the vocabulary head.

Legend: B prompts, G completions per prompt, N = B*G completions, T completion tokens (longest), H hidden size.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint

from perception_r1.policy.batch import PromptBatch, argsort_by_length, to_device
from perception_r1.policy.families import VisionLanguageModel
from perception_r1.policy.forward import forward_behind, packed_forward
from perception_r1.policy.logits import process_logits
from perception_r1.policy.packing import pack, pack_behind
from perception_r1.policy.prompt_states import PromptStates

_HEAD_ROWS = 2048
"""Rows of logits held at once in training; more are recomputed in backward. Below this chunking only costs time."""


def completion_logprobs(
    model: VisionLanguageModel,
    prompts: PromptBatch,
    completions: Sequence[Tensor],
    *,
    suppress_tokens: Tensor,
    temperature: float,
    top_p: float = 1.0,
    states: PromptStates | None = None,
) -> Tensor:
    """Log-probability of every completion token, as the sampler would have drawn it.

    Args:
        model: A causal model whose language model uses `policy/attention.py`.
        prompts: B prompts.
        completions: N token id tensors on the CPU, the G completions of a prompt after one another, none empty.
        suppress_tokens: Ids of tokens that are never written.
        temperature: The sampling temperature.
        top_p: Of nucleus sampling. What was written stays in the nucleus, so that its log-probability is finite.
        states: Those of `prompt_states` of the same prompts, which are then not computed again.

    Returns:
        [N, T], zero behind the end of a completion.

    Raises:
        ValueError: The completions cannot be divided evenly among the prompts.
    """
    group_size = completions_per_prompt(prompts, completions)
    order = argsort_by_length(prompts.lengths)
    rows = [prompt * group_size + g for prompt in order for g in range(group_size)]
    prompts, completions = prompts.select(order), [completions[row] for row in rows]
    lengths = [len(completion) for completion in completions]
    if states is None:
        packing = pack(prompts.lengths, lengths, suppress_tokens.device)
        hidden = packed_forward(model, prompts, completions, packing)  # [tokens of the row, H]
    else:
        packing = pack_behind(states, lengths, suppress_tokens.device)
        hidden = torch.cat([states.hidden, forward_behind(model, prompts, completions, packing)])
    targets = to_device(torch.cat(completions), hidden.device)
    predictors = hidden.index_select(0, packing.predictor_indices)
    picked = target_logprobs(model, predictors, targets, suppress_tokens, temperature, top_p)
    found = dict(zip(rows, picked.split(lengths), strict=True))
    return pad_sequence([found[row] for row in range(len(rows))], batch_first=True)


def completions_per_prompt(prompts: PromptBatch, completions: Sequence[Tensor]) -> int:
    """G; a `ValueError` where there is none."""
    if len(completions) % len(prompts):
        raise ValueError(f"{len(completions)} completions cannot be divided evenly among {len(prompts)} prompts.")
    return len(completions) // len(prompts)


def target_logprobs(
    model: VisionLanguageModel,
    hidden: Tensor,
    targets: Tensor,
    suppress_tokens: Tensor,
    temperature: float,
    top_p: float,
) -> Tensor:
    """[targets] log-probabilities from [targets, H] hidden states; long ones in chunks recomputed in backward."""

    def chunk_logprobs(rows: Tensor, chosen: Tensor) -> Tensor:
        logits = process_logits(
            model.lm_head(rows), suppress_tokens=suppress_tokens, temperature=temperature, top_p=top_p, written=chosen
        )
        return logits.gather(-1, chosen[:, None])[:, 0] - logits.logsumexp(-1)

    if len(targets) <= _HEAD_ROWS:
        return chunk_logprobs(hidden, targets)
    chunks = zip(hidden.split(_HEAD_ROWS), targets.split(_HEAD_ROWS), strict=True)
    return torch.cat([checkpoint(chunk_logprobs, rows, chosen, use_reentrant=False) for rows, chosen in chunks])
