"""A randomly initialised Qwen-VL with prompts and pictures, in a folder that any trainer of the field can load.

The question is filled up so that a prompt has `prompt_tokens` tokens, whatever the picture takes.
"""

import json
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from perception_r1.planning.policy import read_config

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""The benchmarks ban all of them, so that every completion has the full length."""

NUM_PROMPTS = 8
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a network, its pictures and its prompts.

    Attributes:
        prompt_tokens: Tokens of a prompt with its picture.
        picture: Rows and columns of the picture in tokens of 28 x 28 pixels.
        hidden: Width of the language model.
        intermediate: Width of its feed-forward layers.
        layers: Number of its layers.
        heads: Attention heads.
        kv_heads: Key-value heads.
        vocabulary: Tokens.
        is_tied: The vocabulary head shares the embedding's weights.
        vision_hidden: Width of the vision tower.
        vision_layers: Number of its layers.
        vision_heads: Its attention heads.
    """

    prompt_tokens: int
    picture: tuple[int, int]
    hidden: int = 256
    intermediate: int = 1024
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    vocabulary: int = 2048
    is_tied: bool = True
    vision_hidden: int = 256
    vision_layers: int = 2
    vision_heads: int = 4

    @property
    def image_tokens(self) -> int:
        """Tokens of a picture."""
        return self.picture[0] * self.picture[1]


def make_folder(folder: Path, shape: Shape, *, published: str | None = None, has_weights: bool = True) -> None:
    """Write config, weights, tokenizer, image processor, pictures and `prompts.jsonl`; nothing if it is there.

    Args:
        folder: Where to.
        shape: Sizes.
        published: A model of the hub that the network is like, instead of the sizes that `shape` has for it.
        has_weights: Weights are written too.
    """
    if (folder / "shape.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    config = None if published is None else read_config(published)
    tokenizer = _tokenizer(shape.vocabulary if config is None else config.text_config.vocab_size)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4096 * 28 * 28).save_pretrained(folder)
    config = _config(shape, tokenizer) if config is None else _with_tokens(config, tokenizer)
    config.save_pretrained(folder)
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    generation = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    generation.save_pretrained(folder)
    if has_weights:
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(config)
        model.generation_config = generation
        model.save_pretrained(folder)
    height, width = (28 * side for side in shape.picture)
    draw = random.Random(0)
    rows = []
    for number in range(NUM_PROMPTS):
        name = f"images/{number}.png"
        Image.frombytes("RGB", (width, height), draw.randbytes(height * width * 3)).save(folder / name)
        rows.append({"image": name, "text": _question(tokenizer, number, shape)})
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "shape.json").write_text(json.dumps(asdict(shape)))


def _tokenizer(size: int) -> PreTrainedTokenizerFast:
    """One token per byte, filled up with words that never occur."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = letters + [f"word{number}" for number in range(size - len(letters) - len(SPECIAL_TOKENS))]
    tokenizer = Tokenizer(models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:2] + SPECIAL_TOKENS[3:]),
        padding_side="left",
        chat_template=_TEMPLATE,
    )


def _question(tokenizer: PreTrainedTokenizerFast, number: int, shape: Shape) -> str:
    """Fills the prompt up to its length: one character is one token."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    image_size = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1  # the image's tokens are counted apart
    room = shape.prompt_tokens - shape.image_tokens - image_size
    return f"{number}: how many?".ljust(room, ".")[:room]


def _with_tokens(config: PretrainedConfig, tokenizer: PreTrainedTokenizerFast) -> PretrainedConfig:
    """A configuration with the numbers that special tokens have here."""
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for name, token in names.items():
        setattr(config, name, tokenizer.convert_tokens_to_ids(token))
    return config


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    sections = shape.hidden // shape.heads // 8  # of the rotary embedding: 2 for time, 3 each for height and width
    return Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": shape.is_tied,
            "rope_parameters": {
                "rope_type": "default",
                "mrope_section": [sections, sections * 3 // 2, sections * 3 // 2],
                "rope_theta": 1e6,
            },
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.vision_hidden,
            "hidden_size": shape.hidden,
            "num_heads": shape.vision_heads,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=shape.is_tied,
    )
