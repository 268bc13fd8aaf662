"""Qwen2.5-VL: boxes as JSON in pixels of the resized picture, and a vision tower that attends within windows."""

from typing import Any

from transformers import Qwen2_5_VLConfig

from perception_r1.codecs import Qwen25VLCodec
from perception_r1.policy.families.qwen_vl import QwenVL


class Qwen25VL(QwenVL):
    """See `Family`."""

    name = "qwen2_5_vl"
    codec = Qwen25VLCodec()

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Qwen2_5_VLConfig:
        """See `QwenVL`."""
        own = {"intermediate_size": 3 * vision["hidden_size"], "patch_size": 14, "window_size": 112}
        own |= {"fullatt_block_indexes": [vision["depth"] - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision | own, **common)
