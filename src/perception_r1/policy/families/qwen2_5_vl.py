"""Qwen2.5-VL: boxes as JSON in pixels of the resized picture, and a vision tower that attends within windows."""

from typing import Any

from transformers import Qwen2_5_VLConfig

from perception_r1.codecs import JsonCodec
from perception_r1.policy.families.qwen_vl import QwenVL
from perception_r1.records import ImageSize


class Qwen25VLCodec(JsonCodec):
    """JSON in pixels of the image as the model sees it, after smart-resize.

    >>> from perception_r1.records import ImageSize, LabelledBox
    >>> image_size = ImageSize(width=1280, height=960, resized_width=644, resized_height=476)
    >>> text = Qwen25VLCodec().format_boxes([LabelledBox(label="cat", box=(0.25, 0.5, 0.5, 1.0))], image_size)
    >>> text
    '[{"bbox_2d": [161, 238, 322, 476], "label": "cat"}]'
    >>> Qwen25VLCodec().parse_boxes(text, image_size)
    ParsedBoxes(items=(ParsedBox(label='cat', box=(0.25, 0.5, 0.5, 1.0)),), is_exact=True)
    >>> Qwen25VLCodec().parse_boxes('Sure! ' + text, image_size)
    ParsedBoxes(items=(), is_exact=False)
    >>> Qwen25VLCodec().parse_boxes('[{"bbox_2d": [0, 238, 9999, 476]}]', image_size)  # clamped, no label
    ParsedBoxes(items=(ParsedBox(label=None, box=(0.0, 0.5, 1.0, 1.0)),), is_exact=True)
    """

    name = "qwen2_5_vl"
    description = "as JSON, in pixels of the image as the model sees it, after smart-resize"
    uses_resized_size = True

    def units(self, image_size: ImageSize) -> tuple[int, int]:
        """The size after smart-resize."""
        return image_size.resized_width, image_size.resized_height


class Qwen25VL(QwenVL):
    """See `Family`."""

    name = "qwen2_5_vl"
    codec = Qwen25VLCodec()

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Qwen2_5_VLConfig:
        """See `QwenVL`."""
        own = {"intermediate_size": 3 * vision["hidden_size"], "patch_size": 14, "window_size": 112}
        own |= {"fullatt_block_indexes": [vision["depth"] - 1]}
        return Qwen2_5_VLConfig(text_config=text, vision_config=vision | own, **common)
