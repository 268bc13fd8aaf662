"""The model families: one file each, found here by the `model_type` of a configuration."""

from typing import Any

from perception_r1.policy.families.base import Family
from perception_r1.policy.families.qwen2_5_vl import Qwen25VL
from perception_r1.policy.families.qwen2_vl import Qwen2VL
from perception_r1.policy.families.qwen3_5 import Qwen35
from perception_r1.policy.families.qwen3_5_moe import Qwen35Moe
from perception_r1.policy.families.qwen3_vl import Qwen3VL
from perception_r1.policy.families.qwen3_vl_moe import Qwen3VLMoe

_ALL = (Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Qwen35(), Qwen35Moe())
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""Every family by name."""


def family_of(model: Any) -> Family:
    """The family of a causal model."""
    return FAMILIES[model.config.model_type]


__all__ = ["FAMILIES", "Family", "family_of"]
