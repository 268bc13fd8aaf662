"""A folder in the hub's layout with a small, randomly initialised model of a real family, and its own tokenizer.

Sizes, initialisation and rotary frequencies are those with which so small a model learns; all else is the family's.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import pre_tokenizers, trainers
from transformers import AutoModelForImageTextToText, PreTrainedModel, Qwen2Tokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from perception_r1.policy.families import QWEN_FAMILIES
from perception_r1.policy.families.qwen_vl import QwenVLProcessor

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *(f"<|{name}_{side}|>" for name in ("object_ref", "box", "quad", "vision") for side in ("start", "end")),
    *("<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
"""The special tokens of the Qwen-VL families, in their order."""

_CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}
{%- for part in message['content'] -%}
{%- if part['type'] == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
{%- elif part['type'] == 'text' -%}{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{% endif %}<|im_end|>
{% endfor -%}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_MERGE = 2


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """How large a model is, and how its language model tells positions apart.

    Attributes:
        hidden_size: Of the language model, a multiple of `num_heads`.
        rope_theta: Base of the rotary frequencies, which fall from 1 to 1 / `rope_theta` radians per position.
        mrope_section: How many of them, fast ones first, belong to time, row and column; half a head together. An
            answer finds an object by its looks only through frequencies that hardly turn between the two.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    intermediate_size: int
    vision_depth: int
    vision_hidden_size: int
    vision_num_heads: int
    init_std: float
    rope_theta: float
    mrope_section: tuple[int, int, int]


SMALL = ModelSize(
    hidden_size=96,
    num_layers=3,
    num_heads=4,
    num_key_value_heads=4,
    intermediate_size=256,
    vision_depth=2,
    vision_hidden_size=64,
    vision_num_heads=4,
    init_std=0.06,
    rope_theta=10.0,
    mrope_section=(4, 4, 4),
)
"""0.6 million weights, to try code out."""
BASE = ModelSize(
    hidden_size=192,
    num_layers=5,
    num_heads=3,
    num_key_value_heads=1,
    intermediate_size=512,
    vision_depth=4,
    vision_hidden_size=192,
    vision_num_heads=3,
    init_std=0.05,
    rope_theta=10_000.0,
    mrope_section=(2, 5, 25),
)
"""5 million weights: the model that is pretrained."""


def build_model_folder(
    folder: Path,
    *,
    family: str,
    seed: int,
    size: ModelSize = SMALL,
    corpus: Iterable[str] = (),
) -> None:
    """Write config, random weights, generation config, tokenizer and image processor of a Qwen-VL family.

    The tokenizer learns its merges from `corpus`.
    """
    tokenizer = build_tokenizer(corpus)
    with torch.random.fork_rng(devices=[]):  # a run from the cache must find the same random state
        torch.manual_seed(seed)
        model = build_model(family, tokenizer, size)
    QWEN_FAMILIES[family].save(model, folder)
    QwenVLProcessor(tokenizer, build_image_processor(family)).save(folder)


def build_image_processor(family: str) -> Qwen2VLImageProcessorPil:
    """The family's own image processor."""
    patch = QWEN_FAMILIES[family].patch_size
    size = {"shortest_edge": (patch * _MERGE) ** 2, "longest_edge": 1280 * (patch * _MERGE) ** 2}
    return Qwen2VLImageProcessorPil(patch_size=patch, merge_size=_MERGE, size=size)


def build_tokenizer(corpus: Iterable[str]) -> Qwen2Tokenizer:
    """A byte-level tokenizer as Qwen's, with merges learnt from the corpus only."""
    learner = Qwen2Tokenizer(vocab={}, merges=[]).backend_tokenizer  # splits text as Qwen's
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=2000, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    roles = ["user\n", "assistant\n", "system\n"] * 2
    learner.train_from_iterator([*roles, *corpus], trainer)
    learnt = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=list(map(tuple, learnt["merges"])),  # type: ignore[arg-type]
        unk_token=None,  # type: ignore[arg-type]
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = _CHAT_TEMPLATE
    return tokenizer


def build_model(family: str, tokenizer: Qwen2Tokenizer, size: ModelSize) -> PreTrainedModel:
    """The family's own architecture at a tiny size, with random weights."""
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": size.rope_theta, "mrope_section": list(size.mrope_section)}
    text: dict[str, Any] = {
        "vocab_size": -(-len(tokenizer) // 32) * 32,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_key_value_heads,
        "max_position_embeddings": 8192,
        "initializer_range": size.init_std,
        "rope_parameters": rope,
        "bos_token_id": token("<|endoftext|>"),
        "eos_token_id": token("<|im_end|>"),
        "pad_token_id": token("<|endoftext|>"),
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": size.vision_depth,
        "num_heads": size.vision_num_heads,
        "hidden_size": size.vision_hidden_size,
        "out_hidden_size": size.hidden_size,
        "spatial_merge_size": _MERGE,
        "temporal_patch_size": 2,
        "initializer_range": size.init_std,
    }
    config = QWEN_FAMILIES[family].small_config(
        text,
        vision,
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
        initializer_range=size.init_std,
    )
    model: PreTrainedModel = AutoModelForImageTextToText.from_config(config)
    model.generation_config.eos_token_id = [token("<|im_end|>"), token("<|endoftext|>")]
    model.generation_config.pad_token_id = token("<|endoftext|>")
    return model
