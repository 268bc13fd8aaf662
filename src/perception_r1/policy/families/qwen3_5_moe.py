"""Qwen3.5-MoE: Qwen3.5 with feed-forward layers of many experts: each token takes a few, and one that all take."""

from typing import Any

from transformers import Qwen3_5MoeConfig

from perception_r1.policy.families.qwen3_5 import Qwen35, Qwen35DecoderLayer, qwen3_5_text, qwen3_5_vision
from perception_r1.policy.families.qwen3_vl_moe import MoeDecoderLayer


class Qwen35MoeDecoderLayer(MoeDecoderLayer, Qwen35DecoderLayer):
    """A layer of either kind, with experts."""


class Qwen35Moe(Qwen35):
    """See `Family`."""

    name = "qwen3_5_moe"
    decoder_layer = Qwen35MoeDecoderLayer

    def small_config(self, text: dict[str, Any], vision: dict[str, Any], **common: Any) -> Any:
        """See `Family`."""
        size = text["intermediate_size"] // 2
        experts = {"moe_intermediate_size": size, "shared_expert_intermediate_size": size}
        experts |= {"num_experts": 4, "num_experts_per_tok": 2}
        kept = {name: value for name, value in text.items() if name != "intermediate_size"}
        return Qwen3_5MoeConfig(
            text_config=qwen3_5_text(kept) | experts, vision_config=qwen3_5_vision(vision), **common
        )
