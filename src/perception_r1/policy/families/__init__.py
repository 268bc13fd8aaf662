"""The model families: one file each, found here by the `model_type` of a configuration."""

from perception_r1.codecs import Codec
from perception_r1.policy.families.base import Family, VisionLanguageModel
from perception_r1.policy.families.gemma3 import Gemma3
from perception_r1.policy.families.glm4v import Glm4v
from perception_r1.policy.families.internvl import InternVL
from perception_r1.policy.families.qwen2_5_vl import Qwen25VL
from perception_r1.policy.families.qwen2_vl import Qwen2VL
from perception_r1.policy.families.qwen3_5 import Qwen35
from perception_r1.policy.families.qwen3_5_moe import Qwen35Moe
from perception_r1.policy.families.qwen3_vl import Qwen3VL
from perception_r1.policy.families.qwen3_vl_moe import Qwen3VLMoe
from perception_r1.policy.families.qwen_vl import QwenVL

_ALL = (Qwen2VL(), Qwen25VL(), Qwen3VL(), Qwen3VLMoe(), Qwen35(), Qwen35Moe(), InternVL(), Gemma3(), Glm4v())
FAMILIES: dict[str, Family] = {family.name: family for family in _ALL}
"""Every family by name."""
CODECS: dict[str, Codec] = {family.codec.name: family.codec for family in _ALL}
"""Every codec by name; some families share theirs."""
QWEN_FAMILIES: dict[str, QwenVL] = {name: family for name, family in FAMILIES.items() if isinstance(family, QwenVL)}
"""Those of Qwen-VL."""


def family_of(model: VisionLanguageModel) -> Family:
    """The family of a causal model."""
    return FAMILIES[model.config.model_type]


__all__ = ["CODECS", "FAMILIES", "QWEN_FAMILIES", "Family", "QwenVL", "VisionLanguageModel", "family_of"]
