"""Tiny models with random weights of the families outside Qwen-VL, in the hub's layout, with tokenizers like theirs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3TextConfig,
    GemmaTokenizer,
    Glm4vConfig,
    InternVLConfig,
    InternVLVisionConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from transformers.models.glm4v.image_processing_pil_glm4v import Glm4vImageProcessorPil
from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

from perception_r1.embedded.model import build_tokenizer

TILE, PATCH = 28, 7
"""Pixels of a tile's side and of a patch's."""
TOKENS = 4
"""Features of a tile."""
_TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "initializer_range": 0.06,
    "tie_word_embeddings": True,
}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": TILE,
    "patch_size": PATCH,
    "initializer_range": 0.06,
}
_INTERNVL_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<IMG_CONTEXT>
{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
_INTERNVL_NAMES = {
    **{"start_image_token": "<img>", "end_image_token": "</img>"},
    **{"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"},
}
"""As the hub's own processor asks for tokens."""
_GEMMA_TEMPLATE = """\
{{ bos_token }}{% for message in messages %}<start_of_turn>{{ 'model' if message['role'] == 'assistant' else 'user' }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}\
<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

_GLM_TEMPLATE = """\
[gMASK]<sop>{% for message in messages %}<|{{ message['role'] }}|>
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'image' %}<|begin_of_image|><|image|><|end_of_image|>{% else %}{{ part['text'] }}{% endif %}\
{% endfor %}{% endif %}{% if enable_thinking is defined and not enable_thinking and message['role'] == 'user' %}\
/nothink{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% if enable_thinking is defined and not enable_thinking %}<think></think>
{% endif %}{% endif %}"""


def internvl_tokenizer() -> PreTrainedTokenizerBase:
    """As the family's: that of Qwen with tags of its own."""
    tokenizer = build_tokenizer([])
    names = ("img", "ref", "box", "quad")
    tags = [tag for name in names for tag in (f"<{name}>", f"</{name}>")]
    tokenizer.add_special_tokens(
        {"additional_special_tokens": [*tokenizer.additional_special_tokens, *tags, "<IMG_CONTEXT>", "<video>"]}
        if hasattr(tokenizer, "additional_special_tokens")
        else {"extra_special_tokens": [*tokenizer.all_special_tokens, *tags, "<IMG_CONTEXT>", "<video>"]}
    )
    tokenizer.chat_template = _INTERNVL_TEMPLATE
    return tokenizer


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """As the family's: pieces of text, and bytes where there is none."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    special += ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    letters = [chr(code) for code in range(32, 127)]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "\n", "\n\n", *letters[1:]]
    tokenizer = GemmaTokenizer(
        vocab={piece: number for number, piece in enumerate(dict.fromkeys(pieces))},
        merges=[("\n", "\n")],
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "eoi_token": "<end_of_image>",
            "image_token": "<image_soft_token>",
        },
    )
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special[4:6]])
    tokenizer.chat_template = _GEMMA_TEMPLATE
    return tokenizer


def glm_tokenizer() -> PreTrainedTokenizerBase:
    """As the family's: tokens of roles, pictures and boxes."""
    tokenizer = build_tokenizer([])
    names = ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|image|>", "<|video|>"]
    names += [f"<|{side}_of_{name}|>" for name in ("image", "video", "box") for side in ("begin", "end")]
    tokenizer.add_tokens([AddedToken(name, special=True) for name in [*names, "<think>", "</think>"]])
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.chat_template = _GLM_TEMPLATE
    return tokenizer


def glm4v_config(tokenizer: PreTrainedTokenizerBase) -> Glm4vConfig:
    """A tiny GLM-4.1V; half of each head is turned, as in the real ones."""
    token = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 1]}
    vision = {"hidden_size": 32, "depth": 2, "num_heads": 4, "out_hidden_size": 48, "intermediate_size": 64}
    return Glm4vConfig(
        text_config=_TEXT | {"vocab_size": len(tokenizer), "rope_parameters": rope, "tie_word_embeddings": False},
        vision_config=vision | {"image_size": 84, "patch_size": 14, "initializer_range": 0.06},
        image_token_id=token("<|image|>"),
        video_token_id=token("<|video|>"),
        image_start_token_id=token("<|begin_of_image|>"),
        image_end_token_id=token("<|end_of_image|>"),
        video_start_token_id=token("<|begin_of_video|>"),
        video_end_token_id=token("<|end_of_video|>"),
    )


def internvl_config(tokenizer: PreTrainedTokenizerBase, **text: Any) -> InternVLConfig:
    """A tiny InternVL; `text` changes its language model, `model_type` with it."""
    kind = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}[text.pop("model_type", "qwen2")]
    head = {"head_dim": 12} if kind is Qwen3Config else {}
    rope = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}}  # as on the hub
    settings = _TEXT | {"vocab_size": len(tokenizer)} | head | rope | text
    return InternVLConfig(
        text_config=kind(**settings),
        vision_config=InternVLVisionConfig(**_VISION),
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
        tie_word_embeddings=True,
    )


def gemma3_config(tokenizer: PreTrainedTokenizerBase) -> Gemma3Config:
    """A tiny Gemma 3 whose windows are shorter than its prompts."""
    token = tokenizer.convert_tokens_to_ids
    text = Gemma3TextConfig(
        **_TEXT,
        vocab_size=len(tokenizer),
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=9,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        pad_token_id=token("<pad>"),
        eos_token_id=token("<eos>"),
        bos_token_id=token("<bos>"),
    )
    return Gemma3Config(
        text_config=text,
        vision_config=SiglipVisionConfig(**_VISION, vision_use_head=False),
        mm_tokens_per_image=TOKENS,
        boi_token_index=token("<start_of_image>"),
        eoi_token_index=token("<end_of_image>"),
        image_token_index=token("<image_soft_token>"),
        tie_word_embeddings=True,
    )


def build_model_folder(
    folder: Path,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    image_processor: Any,
    end_tokens: tuple[str, ...],
) -> None:
    """Write all files of a model; what is zero in a fresh one is not."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() == 1 or not parameter.any():
                parameter.data += 0.1 * torch.randn(parameter.shape)
    model.generation_config.eos_token_id = [tokenizer.convert_tokens_to_ids(token) for token in end_tokens]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    image_processor.save_pretrained(folder)


def build_internvl(folder: Path, **text: Any) -> None:
    """A tiny InternVL, of up to four tiles."""
    tokenizer = internvl_tokenizer()
    size = {"height": TILE, "width": TILE}
    image_processor = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, max_patches=4)
    ends = ("<|im_end|>", "<|endoftext|>")
    build_model_folder(folder, tokenizer, internvl_config(tokenizer, **text), image_processor, ends)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_special_tokens": _INTERNVL_NAMES}))
    names = {"processor_class": "InternVLProcessor", "image_seq_length": TOKENS}
    (folder / "processor_config.json").write_text(json.dumps(names))


def build_gemma3(folder: Path) -> None:
    """A tiny Gemma 3."""
    tokenizer = gemma_tokenizer()
    image_processor = Gemma3ImageProcessorPil(size={"height": TILE, "width": TILE})
    build_model_folder(folder, tokenizer, gemma3_config(tokenizer), image_processor, ("<eos>", "<end_of_turn>"))


def build_glm4v(folder: Path) -> None:
    """A tiny GLM-4.1V, with the bounds of pixels that small Qwen-VLs have."""
    tokenizer = glm_tokenizer()
    image_processor = Glm4vImageProcessorPil(size={"shortest_edge": 2 * 28**2, "longest_edge": 2 * 1280 * 28**2})
    ends = ("<|endoftext|>", "<|user|>", "<|observation|>")
    build_model_folder(folder, tokenizer, glm4v_config(tokenizer), image_processor, ends)


BUILDERS: dict[str, Callable[[Path], None]] = {
    "internvl": build_internvl,
    "gemma3": build_gemma3,
    "glm4v": build_glm4v,
}
"""By family."""
