"""Qwen3-VL: boxes as JSON in thousandths, learned positions of patches, image features that reach several layers."""

from typing import Any

from transformers import Qwen3VLConfig

from perception_r1.codecs import Qwen3VLCodec
from perception_r1.policy.families.qwen_vl import QwenVL


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
