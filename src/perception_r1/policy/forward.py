"""The parts of a forward pass that prefill and log-probabilities share: image features, packed embeddings, the network.

Legend: B prompts, M tokens of all prompts, R further tokens, H hidden size, V vocabulary, F image features.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.packing import Packing

QwenVL: TypeAlias = Any
"""A `...ForConditionalGeneration` of the Qwen-VL families, for which transformers has no common type."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptEmbeddings:
    """Prompts one after another in a single row without padding, ready for the language model.

    Attributes:
        inputs_embeds: [M, H] embeddings, image features in their places.
        position_ids: [3, M] multimodal rotary positions.
        is_image: [M] True where an image feature stands.
        deepstack: [L, F, H] features added after the first L layers (Qwen3-VL); L is 0 elsewhere.
        next_position: [B] position of the first completion token.
    """

    inputs_embeds: Tensor
    position_ids: Tensor
    is_image: Tensor
    deepstack: Tensor
    next_position: Tensor


def encode_images(model: QwenVL, prompts: PromptBatch) -> tuple[Tensor, ...]:
    """Run the vision tower once on every image; see `PromptBatch.features`."""
    seen = model.model.get_image_features(prompts.pixel_values, prompts.image_grid_thw, return_dict=True)
    images = [image[None] for image in seen.pooler_output]  # each [1, tokens, H]
    sizes = [image.shape[1] for image in images]
    layers = getattr(seen, "deepstack_features", None) or []
    for layer in layers:
        of_images = layer.split(sizes) if torch.is_tensor(layer) else layer
        images = [torch.cat([image, more[None]]) for image, more in zip(images, of_images, strict=True)]
    return tuple(images)


def embed_prompts(model: QwenVL, prompts: PromptBatch) -> PromptEmbeddings:
    """Embed prompts; the vision tower runs only where nobody has looked at the images yet."""
    base = model.model
    is_token = prompts.attention_mask.bool()
    positions, _ = base.get_rope_index(
        prompts.input_ids,
        mm_token_type_ids=prompts.mm_token_type_ids,
        image_grid_thw=prompts.image_grid_thw,
        attention_mask=prompts.attention_mask,
    )
    is_image = prompts.mm_token_type_ids[is_token] == 1
    text = base.get_input_embeddings()(prompts.input_ids[is_token])  # [M, H]
    image_features = torch.cat(prompts.image_features or encode_images(model, prompts), 1).to(
        text.dtype
    )  # [1 + L, F, H]
    return PromptEmbeddings(
        inputs_embeds=text.masked_scatter(is_image[:, None], image_features[0]),
        position_ids=positions[:, is_token],
        is_image=is_image,
        deepstack=image_features[1:],
        next_position=positions.amax((0, 2)) + 1,
    )


def packed_forward(
    model: QwenVL,
    prompts: PromptEmbeddings,
    packing: Packing,
    *,
    tokens: Tensor | None = None,
    positions: Tensor | None = None,
    cache: Any = None,
) -> Tensor:
    """The language model over prompts and whatever follows them in the row.

    Args:
        model: A Qwen-VL causal model whose language model uses `policy/attention.py`.
        prompts: The prompts.
        packing: Who sees whom.
        tokens: [R] further token ids, behind the prompts.
        positions: [R] their positions.
        cache: A transformers cache that is to take the keys and values up.

    Returns:
        [M + R, H] last hidden states.
    """
    embeds, position_ids, is_image = prompts.inputs_embeds, prompts.position_ids, prompts.is_image
    if tokens is not None and positions is not None:
        embeds = torch.cat([embeds, model.model.get_input_embeddings()(tokens)])
        position_ids = torch.cat([position_ids, positions.expand(3, -1)], 1)
        is_image = torch.cat([is_image, is_image.new_zeros(len(tokens))])
    deepstack: dict[str, Any] = {}
    if len(prompts.deepstack):
        deepstack = {"visual_pos_masks": is_image[None], "deepstack_visual_embeds": list(prompts.deepstack)}
    return model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=position_ids[:, None],
        attention_mask=None,
        past_key_values=cache,
        use_cache=cache is not None,
        packing=packing,
        **deepstack,
    ).last_hidden_state[0]


def process_logits(logits: Tensor, *, suppress_tokens: Tensor, temperature: float) -> Tensor:
    """Logits [..., V] over the tokens that may be written, in at least fp32 and divided by the temperature.

    Args:
        logits: [..., V] of the vocabulary head; they are used up, for a copy of them may take a gigabyte.
        suppress_tokens: Ids of tokens that are never written (vision tokens): their logit becomes -inf.
        temperature: Sampling temperature, above 0.
    """
    logits = logits.to(at_least_fp32(logits.dtype))
    logits = logits.index_fill_(-1, suppress_tokens, float("-inf"))
    return logits if temperature == 1.0 else logits.div_(temperature)


def at_least_fp32(dtype: torch.dtype) -> torch.dtype:
    """The type in which metrics are kept that half precision would spoil: fp32, or fp64 where the model has it."""
    return torch.promote_types(torch.float32, dtype)


def argsort_by_length(lengths: Sequence[int]) -> list[int]:
    """Prompts in order of length: equal ones come together, and the attention then takes them together."""
    return sorted(range(len(lengths)), key=lengths.__getitem__)
