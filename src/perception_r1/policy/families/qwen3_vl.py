"""Qwen3-VL: boxes as JSON in thousandths, learned positions of patches, image features that reach several layers."""

from typing import Any

from transformers import Qwen3VLConfig

from perception_r1.codecs import JsonCodec
from perception_r1.policy.families.qwen_vl import QwenVL


class Qwen3VLCodec(JsonCodec):
    """The JSON of Qwen2.5-VL with numbers 0..1000 of the image's width and height.

    >>> from perception_r1.records import ImageSize, LabelledBox
    >>> image_size = ImageSize(width=1280, height=960, resized_width=1280, resized_height=960)
    >>> Qwen3VLCodec().format_boxes([LabelledBox(label="cat", box=(0.25, 0.5, 0.5, 1.0))], image_size)
    '[{"bbox_2d": [250, 500, 500, 1000], "label": "cat"}]'
    >>> Qwen3VLCodec().parse_boxes("null", image_size)
    ParsedBoxes(items=(), is_exact=False)
    >>> Qwen3VLCodec().parse_boxes("[]", image_size)
    ParsedBoxes(items=(), is_exact=True)
    """

    name = "qwen3_vl"
    description = "as JSON, in thousandths of the image"


class Qwen3VL(QwenVL):
    """See `Family`."""

    name = "qwen3_vl"
    codec = Qwen3VLCodec()
    patch_size = 16

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Any:
        """See `QwenVL`."""
        return Qwen3VLConfig(text_config=qwen3_text(text), vision_config=qwen3_vision(vision), **common)


def qwen3_text(text: dict[str, Any]) -> dict[str, Any]:
    """Settings of a language model with heads of a size of their own, and positions that are interleaved."""
    head = text["hidden_size"] // text["num_attention_heads"]
    return text | {"head_dim": head, "rope_parameters": text["rope_parameters"] | {"mrope_interleaved": True}}


def qwen3_vision(vision: dict[str, Any]) -> dict[str, Any]:
    """Settings of a vision tower with learned positions, of which one layer hands its features on."""
    own = {"intermediate_size": 3 * vision["hidden_size"], "patch_size": 16, "num_position_embeddings": 256}
    return vision | own | {"deepstack_visual_indexes": [0]}
