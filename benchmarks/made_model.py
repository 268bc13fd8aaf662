"""A randomly initialised Qwen2-VL with prompts and pictures, in a folder that any trainer of the field can load.

The picture is a square of `image_tokens` tokens and the question is always 77 tokens long, so that a prompt has
`image_tokens` + 77 of them.
"""

import json
import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
_QUESTION_TOKENS = 77
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of a network and its picture.

    Attributes:
        image_tokens: Tokens of a picture, a square number.
        hidden: Width of the language model; heads have 64 each, twice as many as key-value heads.
        layers: Of the language model.
        vocabulary: Tokens.
        vision_layers: Of the vision tower, which is as wide as the language model.
    """

    image_tokens: int
    hidden: int = 256
    layers: int = 4
    vocabulary: int = 2048
    vision_layers: int = 2

    @property
    def prompt_tokens(self) -> int:
        """Tokens of a prompt."""
        return self.image_tokens + _QUESTION_TOKENS


def make_folder(folder: Path, shape: Shape) -> None:
    """Write config, weights, tokenizer, image processor, pictures and `prompts.jsonl`; nothing if it is there."""
    if (folder / "shape.json").exists():
        return
    (folder / "images").mkdir(parents=True, exist_ok=True)
    tokenizer = _tokenizer(shape.vocabulary)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=4096 * 28 * 28).save_pretrained(folder)
    torch.manual_seed(0)
    model = Qwen2VLForConditionalGeneration(_config(shape, tokenizer))
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>"))
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=pad)
    model.save_pretrained(folder)
    side = 28 * math.isqrt(shape.image_tokens)
    draw = random.Random(0)
    rows = []
    for number in range(NUM_PROMPTS):
        name = f"images/{number}.png"
        Image.frombytes("RGB", (side, side), draw.randbytes(side * side * 3)).save(folder / name)
        rows.append({"image": name, "text": _question(tokenizer, number)})
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


def _question(tokenizer: PreTrainedTokenizerFast, number: int) -> str:
    """Fills the prompt up to its length."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": ""}]}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    frame = len(tokenizer(text, add_special_tokens=False)["input_ids"]) - 1  # the image's tokens are counted apart
    return f"Question {number}: how many objects are there in the picture?".ljust(_QUESTION_TOKENS - frame, ".")


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Qwen2VLConfig:
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    heads = shape.hidden // 64
    return Qwen2VLConfig(
        text_config={
            "vocab_size": shape.vocabulary,
            "hidden_size": shape.hidden,
            "intermediate_size": 4 * shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "default", "mrope_section": [8, 12, 12], "rope_theta": 1e6},
            "bos_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "pad_token_id": ids["<|endoftext|>"],
        },
        vision_config={
            "depth": shape.vision_layers,
            "embed_dim": shape.hidden,
            "hidden_size": shape.hidden,
            "num_heads": heads,
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
