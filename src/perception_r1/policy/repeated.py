"""Families whose prompts the engine cannot share: passes of transformers' own model over padded rows.

Training repeats each prompt for every completion, and computes the features of its pictures once. A rollout computes a
prompt once as well, and repeats what has been computed of it.

Legend: B prompts, G completions per prompt, N = B*G completions, R rows that are still being written, P tokens of a
row, T completion tokens (longest), H hidden size, V vocabulary.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache

from perception_r1.policy.batch import PromptBatch, move_together, to_device
from perception_r1.policy.families import VisionLanguageModel, family_of
from perception_r1.policy.logprobs import completions_per_prompt, target_logprobs
from perception_r1.policy.rollout import Rollout, SamplingParams, decode


def repeated_logprobs(
    model: VisionLanguageModel,
    prompts: PromptBatch,
    completions: Sequence[Tensor],
    *,
    suppress_tokens: Tensor,
    temperature: float,
    top_p: float = 1.0,
) -> Tensor:
    """Log-probability of every completion token; the arguments and the result are those of `completion_logprobs`."""
    group_size = completions_per_prompt(prompts, completions)
    owners = [prompt for prompt in range(len(prompts)) for _ in range(group_size)]
    hidden = _forward(model, prompts, owners, [completion[:-1] for completion in completions], side="right")
    lengths = [len(completion) for completion in completions]
    starts = [row * hidden.shape[1] + prompts.lengths[owner] - 1 for row, owner in enumerate(owners)]
    indices = [torch.arange(start, start + length) for start, length in zip(starts, lengths, strict=True)]
    predictors, targets = move_together([torch.cat(indices), torch.cat(list(completions))], hidden.device)
    rows = hidden.flatten(0, 1).index_select(0, predictors)
    picked = target_logprobs(model, rows, targets, suppress_tokens, temperature, top_p)
    return pad_sequence(picked.split(lengths), batch_first=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class PaddedPrompts:
    """What transformers has computed of prompts.

    Attributes:
        cache: Keys and values, filled on the left.
        is_token: [B, P] 1 for tokens, 0 for filling; None where all prompts are equally long.
        input_ids: Ids of each prompt, on the CPU, B entries.
        hidden: [B, H] last hidden state of the last token, which predicts the first completion token.
        next_positions: [B] of the first completion token.
    """

    cache: Any
    is_token: Tensor | None
    input_ids: tuple[Tensor, ...]
    hidden: Tensor
    next_positions: Tensor


@torch.no_grad()
def prefill_padded(model: VisionLanguageModel, prompts: PromptBatch) -> PaddedPrompts:
    """Run the prompts through the model, once each."""
    cache: Any = DynamicCache(config=model.config.get_text_config())
    none = torch.empty(0, dtype=torch.long)
    hidden = _forward(model, prompts, range(len(prompts)), [none] * len(prompts), side="left", cache=cache)
    is_token = _pad([torch.ones_like(ids) for ids in prompts.input_ids], "left")
    positions = torch.tensor(prompts.next_positions)
    is_token, next_positions = move_together([is_token, positions], hidden.device)
    return PaddedPrompts(
        cache=cache,
        is_token=None if len(set(prompts.lengths)) == 1 else is_token,
        input_ids=prompts.input_ids,
        hidden=hidden[:, -1],
        next_positions=next_positions,
    )


class RepeatedCache:
    """Keys and values of rows, the prompt's among them."""

    def __init__(self, prompts: PaddedPrompts, group_size: int) -> None:
        self.cache = copy.deepcopy(prompts.cache)  # prompts can be used again
        self.cache.batch_repeat_interleave(group_size)
        self.is_token = None if prompts.is_token is None else prompts.is_token.repeat_interleave(group_size, 0)
        self.positions = prompts.next_positions.repeat_interleave(group_size, 0)

    def select_rows(self, rows: Tensor) -> None:
        """See `SelectsRows`."""
        kept = rows.flatten()
        self.cache.batch_select_indices(kept)
        self.positions = self.positions[kept]
        self.is_token = None if self.is_token is None else self.is_token[kept]

    def begin_step(self) -> None:
        """Turn to the next token."""
        if self.is_token is not None:
            self.is_token = F.pad(self.is_token, (0, 1), value=1)

    def end_step(self) -> None:
        """The token has been read."""
        self.positions = self.positions + 1


@torch.no_grad()
def generate_repeated(
    model: VisionLanguageModel,
    prompts: PaddedPrompts,
    *,
    group_size: int,
    params: SamplingParams,
    seeds: Sequence[int],
) -> Rollout:
    """Write G completions of each of B prompts, from B seeds; see `rollout.generate`."""
    cache = RepeatedCache(prompts, group_size)

    def step(tokens: Tensor, cache: RepeatedCache) -> Tensor:
        return next_logits(model, tokens, cache)

    logits = model.lm_head(prompts.hidden)
    return decode(step, cache, logits, prompts.input_ids, group_size=group_size, params=params, seeds=seeds)


def next_logits(model: VisionLanguageModel, tokens: Tensor, cache: RepeatedCache) -> Tensor:
    """[R, V] from a token of each row [R], which the cache takes up."""
    cache.begin_step()
    output = model.model(
        inputs_embeds=model.model.get_input_embeddings()(tokens[:, None]),
        attention_mask=cache.is_token,
        position_ids=family_of(model).position_ids(cache.positions[:, None].expand(3, -1, -1)),
        past_key_values=cache.cache,
        use_cache=True,
    )
    cache.end_step()
    return cast(Tensor, model.lm_head(output.last_hidden_state[:, -1]))


def _forward(
    model: VisionLanguageModel,
    prompts: PromptBatch,
    owners: Sequence[int],
    continuations: Sequence[Tensor],
    *,
    side: str,
    cache: Any = None,
) -> Tensor:
    """The model over rows of a prompt and what follows it.

    Args:
        model: Of any family.
        prompts: B prompts.
        owners: The number of each row's prompt.
        continuations: Token ids that follow it, on the CPU.
        side: On which rows are filled up.
        cache: A transformers cache that is to take the keys and values up.

    Returns:
        [rows, P, H] last hidden states.
    """
    family, embedding = family_of(model), model.model.get_input_embeddings()
    pairs = list(zip(owners, continuations, strict=True))
    image = model.config.image_token_id
    ids = _pad([torch.cat([prompts.input_ids[owner], more]) for owner, more in pairs], side)
    is_token = _pad([torch.ones(prompts.lengths[owner] + len(more), dtype=torch.long) for owner, more in pairs], side)
    is_image = _pad([F.pad(prompts.input_ids[owner] == image, (0, len(more))) for owner, more in pairs], side)
    starts = prompts.next_positions
    positions = [
        torch.cat([prompts.position_ids[owner], torch.arange(len(more)).expand(3, -1) + starts[owner]], 1).T
        for owner, more in pairs
    ]
    layout = [ids, is_token, is_image.flatten().nonzero()[:, 0], _pad(positions, side)]
    ids, is_token, image_indices, position_ids = move_together(layout, embedding.weight.device)
    embeds = embedding(ids)  # [rows, P, H]
    features = torch.cat(_features(model, prompts, owners)).to(embeds.dtype)
    embeds = embeds.flatten(0, 1).index_copy(0, image_indices, features).view(embeds.shape)
    output = model.model(
        inputs_embeds=embeds,
        attention_mask=is_token,
        position_ids=family.position_ids(position_ids.permute(2, 0, 1)),
        past_key_values=cache,
        use_cache=cache is not None,
        **family.mask_inputs(to_device(is_image, embeds.device)),
    )
    return cast(Tensor, output.last_hidden_state)


def _features(model: VisionLanguageModel, prompts: PromptBatch, owners: Sequence[int]) -> list[Tensor]:
    """[tokens, H] of all pictures of each row, in the order of the rows."""
    images = prompts.image_features or family_of(model).encode_images(model, prompts)
    if any(len(image) > 1 for image in images):
        raise ValueError("Features for further layers reach no row of this kind.")
    left = iter(images)
    of_prompts = [[next(left)[0] for _ in range(count)] for count in prompts.num_images]
    return [torch.cat(of_prompts[owner]) for owner in owners]


def _pad(rows: Sequence[Tensor], side: str) -> Tensor:
    return pad_sequence(list(rows), batch_first=True, padding_side=side)
