"""The parts of a forward pass that rollout and log-probabilities share: prompt embeddings, positions, the head.

Legend: B prompts, P prompt tokens, H hidden size, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch

QwenVL: TypeAlias = Any
"""A `...ForConditionalGeneration` of the Qwen-VL families, for which transformers has no common type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EmbeddedPrompts:
    """Prompts after the vision tower, ready for the language model.

    Attributes:
        inputs_embeds: [B, P, H] embeddings, image features in their places.
        position_ids: [3, B, P] multimodal rotary positions.
        attention_mask: [B, P] 1 for tokens, 0 for padding.
        next_position: [B] position of the first completion token.
        extra: What a family's language model wants besides (Qwen3-VL: features for its first layers).
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    next_position: Tensor
    extra: dict[str, Any] = field(default_factory=dict)


def embed_prompts(model: QwenVL, prompts: PromptBatch) -> EmbeddedPrompts:
    """Run the vision tower once per image and put its features where the prompt's image tokens stand."""
    base = model.model
    position_ids, _ = base.get_rope_index(
        prompts.input_ids,
        mm_token_type_ids=prompts.mm_token_type_ids,
        image_grid_thw=prompts.image_grid_thw,
        attention_mask=prompts.attention_mask,
    )
    is_image = prompts.mm_token_type_ids == 1
    vision = base.get_image_features(prompts.pixel_values, prompts.image_grid_thw, return_dict=True)
    text = base.get_input_embeddings()(prompts.input_ids)
    features = torch.cat(list(vision.pooler_output)).to(text.dtype)
    extra: dict[str, Any] = {}
    if getattr(vision, "deepstack_features", None) is not None:
        layers = [layer if torch.is_tensor(layer) else torch.cat(list(layer)) for layer in vision.deepstack_features]
        extra = {"visual_pos_masks": is_image, "deepstack_visual_embeds": layers}
    return EmbeddedPrompts(
        inputs_embeds=text.masked_scatter(is_image[..., None], features),
        position_ids=position_ids,
        attention_mask=prompts.attention_mask,
        next_position=position_ids.amax((0, 2)) + 1,
        extra=extra,
    )


def head_logits(model: QwenVL, hidden: Tensor, *, banned: Tensor, temperature: float) -> Tensor:
    """Logits over the tokens that may be written, in at least fp32 and divided by the temperature.

    Args:
        model: The causal model.
        hidden: [..., H] last hidden states.
        banned: Ids of tokens that are never written (vision tokens): their logit is -inf.
        temperature: Sampling temperature, above 0.

    Returns:
        [..., V].
    """
    logits = model.lm_head(hidden)
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype))
    return logits.index_fill(-1, banned, float("-inf")) / temperature
