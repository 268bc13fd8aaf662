"""Qwen2-VL: boxes between special tokens."""

from typing import Any

from transformers import Qwen2VLConfig

from perception_r1.codecs import Qwen2VLCodec
from perception_r1.policy.families.qwen_vl import QwenVL


class Qwen2VL(QwenVL):
    """See `Family`."""

    name = "qwen2_vl"
    codec = Qwen2VLCodec()

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Qwen2VLConfig:
        """See `QwenVL`."""
        sizes = {"embed_dim": vision["hidden_size"], "hidden_size": vision["out_hidden_size"], "mlp_ratio": 4}
        kept = {name: value for name, value in vision.items() if name != "out_hidden_size"}
        return Qwen2VLConfig(text_config=text, vision_config=kept | sizes | {"patch_size": 14}, **common)
