"""The pass that prefill and log-probabilities share: prompts and completions in a row, through the language model.

Legend: B prompts, N completions, M tokens of all prompts, R input tokens of all completions, T = M + R tokens of the
row, H hidden size, V vocabulary, F image features.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch, move_together
from perception_r1.policy.families import VisionLanguageModel, family_of
from perception_r1.policy.packing import Packing


def packed_forward(
    model: VisionLanguageModel, prompts: PromptBatch, completions: Sequence[Tensor], packing: Packing
) -> Tensor:
    """The language model over a row; the vision tower runs only where the batch has no features yet.

    Args:
        model: A causal model whose language model uses `policy/attention.py`.
        prompts: B prompts.
        completions: N token id tensors on the CPU, the G completions of a prompt after one another; or none at all.
        packing: Who sees whom.

    Returns:
        [T, H] last hidden states.
    """
    embedding = model.model.get_input_embeddings()
    row = lay_out_row(prompts, completions, image_token_id=model.config.image_token_id)
    tokens, position_ids, image_indices = move_together(row, embedding.weight.device)
    embeds = embedding(tokens)  # [T, H]
    images = prompts.image_features or family_of(model).encode_images(model, prompts)
    features = torch.cat(images, 1).to(embeds.dtype)  # [1 + L, F, H]
    embeds = embeds.index_copy(0, image_indices, features[0])
    deepstack: dict[str, Any] = {}
    if len(features) > 1:
        # A mask of the row's image tokens would be searched on the device. So the features are spread over the whole
        # row, zeros elsewhere, and the mask's role is played by the number of the only row of the batch.
        spread = embeds.new_zeros(len(features) - 1, *embeds.shape).index_copy(1, image_indices, features[1:])
        deepstack = {"visual_pos_masks": tokens.new_zeros(1), "deepstack_visual_embeds": list(spread)}
    return _language_model(model, embeds, position_ids, packing, **deepstack)


def forward_behind(
    model: VisionLanguageModel, prompts: PromptBatch, completions: Sequence[Tensor], packing: Packing
) -> Tensor:
    """The language model over a row of completions alone, behind prompts that the packing knows.

    Returns:
        [R, H] last hidden states.
    """
    embedding = model.model.get_input_embeddings()
    tokens, position_ids = move_together(_lay_out_completions(prompts, completions), embedding.weight.device)
    embeds = embedding(tokens)  # [R, H]
    return _language_model(model, embeds, position_ids, packing) if len(embeds) else embeds


def _language_model(
    model: VisionLanguageModel, embeds: Tensor, position_ids: Tensor, packing: Packing, **more: Any
) -> Tensor:
    """[T, H] last hidden states of a row from its embeddings [T, H] and rotary positions [3, T]."""
    family = family_of(model)
    output = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=family.position_ids(position_ids[:, None]),
        attention_mask=family.no_mask,
        use_cache=False,
        packing=packing,
        **more,
    )
    return cast(Tensor, output.last_hidden_state[0])


def lay_out_row(
    prompts: PromptBatch, completions: Sequence[Tensor], *, image_token_id: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What stands in a row: all prompts, then all completions, each without its last token, which is never read.

    Returns:
        Token ids [T], rotary positions [3, T], and where image features stand [F]; all on the CPU.
    """
    tokens, position_ids = _lay_out_completions(prompts, completions)
    tokens, position_ids = torch.cat([*prompts.input_ids, tokens]), torch.cat([*prompts.position_ids, position_ids], 1)
    is_image = tokens[: sum(prompts.lengths)] == image_token_id
    return tokens, position_ids, is_image.nonzero()[:, 0]


def _lay_out_completions(prompts: PromptBatch, completions: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids [R] and rotary positions [3, R] of completions, each without its last token, on the CPU."""
    group_size = len(completions) // len(prompts)
    starts = [position for position in prompts.next_positions for _ in range(group_size)]  # of each completion
    steps = [
        torch.arange(start, start + len(completion) - 1).expand(3, -1)
        for start, completion in zip(starts, completions, strict=True)
    ]
    none = torch.empty(0, dtype=torch.long)
    tokens = torch.cat([none, *(completion[:-1] for completion in completions)])
    return tokens, torch.cat([none.expand(3, 0), *steps], 1)
