"""What the engine is compared with: the plain model of transformers, one row at a time, without padding or packing."""

import inspect
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText
from transformers.generation.logits_process import TopPLogitsWarper

from perception_r1.policy.batch import PromptBatch
from perception_r1.policy.families import FAMILIES
from perception_r1.policy.families.patches import PatchFamily
from perception_r1.policy.processor import Processor

PATCH_FAMILIES = [name for name, family in FAMILIES.items() if isinstance(family, PatchFamily)]
"""Families whose tokens have positions in three directions."""
CHATS: list[tuple[str, list[tuple[int, int]]]] = [
    ("Where is it?", [(56, 84)]),
    ("Compare the first picture with the second one, please.", [(84, 28), (56, 56)]),
    ("Read.", [(112, 56)]),
    ("Is there a cup?", [(28, 84)]),
    ("Who has it??", [(84, 56)]),
]
"""Text and sizes of the pictures of five prompts: three ragged in tokens, in pictures and in patches, then two of as
many tokens as the first, of which one has a picture of other patches and so ends at another position."""


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    data = random.Random(f"{width} {height} {seed}").randbytes(width * height * 3)
    return Image.frombytes("RGB", (width, height), data)


def chat(text: str, num_images: int = 1) -> list[dict[str, Any]]:
    parts: list[dict[str, str]] = [{"type": "image"} for _ in range(num_images)]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def encode(processor: Processor, indices: Sequence[int] = (0, 1, 2)) -> PromptBatch:
    """Some of the prompts as one batch."""
    chosen = [CHATS[index] for index in indices]
    images = [[noise(*size, seed=index) for size in sizes] for index, (_, sizes) in zip(indices, chosen, strict=True)]
    return processor.encode([chat(text, len(sizes)) for text, sizes in chosen], images, max_tokens=None)


def inputs(model: Any, prompt: PromptBatch, completion: Tensor | None = None) -> dict[str, Tensor]:
    """What the plain model takes for a single prompt and what follows it; its `forward` says what that is."""
    ids = torch.cat([prompt.input_ids[0], *([] if completion is None else [completion])])[None]
    is_image = (ids == model.config.image_token_id).int()
    grids = torch.tensor(prompt.image_grids)
    own = {"mm_token_type_ids": is_image, "token_type_ids": is_image, "image_grid_thw": grids}
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    taken = {name: own[name] for name in own.keys() & inspect.signature(base.forward).parameters.keys()}
    pixels = torch.cat(prompt.pixel_values)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **taken}


def is_vision(name: str) -> bool:
    """Whether a parameter makes features of pixels."""
    return "language_model." not in name and "lm_head." not in name


def plain_model(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    """Weights and buffers in the same type, as in a policy that was converted."""
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model.to(dtype).eval()


def shake(network: Any, seed: int = 0) -> None:
    """Give a fresh adapter, which changes nothing, random weights."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)


def adapt(plain: Any, network: Any) -> Any:
    """The plain model inside a second adapter with the same settings and weights as that of a network."""
    adapted = get_peft_model(plain, network.peft_config["default"])
    weights = {name: value for name, value in network.state_dict().items() if "lora_" in name}
    assert weights
    assert not adapted.load_state_dict(weights, strict=False).unexpected_keys
    return adapted.to(plain.dtype).eval()


def distributions(
    model: Any,
    prompt: PromptBatch,
    completion: Tensor,
    suppress_tokens: Tensor,
    temperature: float,
    top_p: float = 1.0,
) -> Tensor:
    """[T, V] log-probabilities of every possible token at each step of a completion of a single prompt."""
    logits = model(**inputs(model, prompt, completion)).logits[0, prompt.lengths[0] - 1 : -1]
    logits = logits.to(torch.promote_types(torch.float32, logits.dtype)).index_fill(-1, suppress_tokens, float("-inf"))
    logits = logits / temperature
    if top_p < 1:
        logits = TopPLogitsWarper(top_p)(None, logits)
    return logits.log_softmax(-1)


def logprobs(
    model: Any,
    prompt: PromptBatch,
    completion: Tensor,
    suppress_tokens: Tensor,
    temperature: float,
    top_p: float = 1.0,
) -> Tensor:
    """[T] log-probabilities of a completion of a single prompt."""
    logprobs = distributions(model, prompt, completion, suppress_tokens, temperature, top_p)
    return logprobs.gather(-1, completion[:, None])[:, 0]


def random_completions(lengths: Sequence[int], seed: int = 0) -> list[Tensor]:
    """Token ids that are neither vision tokens nor beyond the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 270, (length,), generator=generator) for length in lengths]
