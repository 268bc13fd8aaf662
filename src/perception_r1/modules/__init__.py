"""The two trainings as LightningModules."""

from perception_r1.modules.grpo import GRPO
from perception_r1.modules.sft import SFT

__all__ = ["GRPO", "SFT"]
