"""What every prompt taught, recorded over the epochs, and what the next epoch shows because of it."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from perception_r1.data.curriculum import PromptMemory
from perception_r1.data.module import TaskDataModule
from perception_r1.errors import UserError
from perception_r1.modules.grpo import GRPO


class OnlineCurriculum(Callback):
    """Let prompts that taught nothing sit out the next epoch, see `PromptMemory`.

    `train/frac_prompts_resting` is the share that sits out the epoch that goes on. Every device keeps record of the
    prompts of all.

    Args:
        enabled: Do so at all. It takes data that is shown several times: in the first epoch nothing changes.

    Raises:
        UserError: At the start of a fit that is no GRPO, or of several tasks, whose shares it would change.
    """

    def __init__(self, enabled: bool = False) -> None:
        self.enabled = enabled
        self.memory = PromptMemory()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Hand the memory to the data."""
        if not self.enabled or stage != "fit":
            return
        data: Any = getattr(trainer, "datamodule", None)
        if not isinstance(pl_module, GRPO) or not isinstance(data, TaskDataModule):
            raise UserError("online_curriculum.enabled needs GRPO and the data of one task; leave it false here.")
        data.follow(self.memory)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record what the prompts of all devices taught."""
        if not self.enabled or not isinstance(outputs, Mapping):
            return
        values = outputs["has_taught"].to(pl_module.device)
        if trainer.world_size > 1:
            values = pl_module.all_gather(values)
        known = [None if value < 0 else value > 0 for value in values.flatten().tolist()]
        self.memory.update(batch_idx * len(known), known)
        share = len(self.memory.resting) / len(trainer.datamodule.samples("train"))  # type: ignore[attr-defined]
        pl_module.log("train/frac_prompts_resting", torch.tensor(share), batch_size=1)

    def state_dict(self) -> dict[str, Any]:
        """What the orders of this epoch and of the next one depend on."""
        return self.memory.state_dict() if self.enabled else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it up again, where the run had one."""
        if state_dict:
            self.memory.load_state_dict(state_dict)
