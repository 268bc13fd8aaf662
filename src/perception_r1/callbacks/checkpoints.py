"""The two checkpoints of a run: `last.ckpt`, to go on from, and `best.ckpt`, to use."""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from perception_r1.modules.evaluation import EvaluationModule

FOLDER = "checkpoints"
"""Folder of a run in which its checkpoints lie."""


class Checkpoints(Checkpoint):
    """Saves after each validation, at the end, and when a run is stopped between two steps.

    A checkpoint always stands between two batches, with all updates of a rollout done, so that going on from it is
    exact. A run that dies in the middle of a step therefore keeps the checkpoint before.

    Args:
        enabled: Write checkpoints at all.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.best_value = -math.inf
        self._is_inside_step = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on weights and counters disagree."""
        self._is_inside_step = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """From here on they agree again."""
        self._is_inside_step = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `best.ckpt` when the task's primary metric has improved, and `last.ckpt` in any case."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = trainer.callback_metrics.get(cast(EvaluationModule, pl_module).monitor)
        if isinstance(value, Tensor) and float(value) > self.best_value:
            self.best_value = float(value)
            self._save(trainer, "best.ckpt")
        self._save(trainer, "last.ckpt")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        self._save(trainer, "last.ckpt")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run was stopped, if that was between two steps; a validation that was cut is then left out."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.global_step == 0 or self._is_inside_step:
            return
        if trainer.validating:
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
        self._save(trainer, "last.ckpt")

    def state_dict(self) -> dict[str, Any]:
        """The best metric so far survives a resume."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best metric so far."""
        self.best_value = state_dict["best_value"]

    def _save(self, trainer: Trainer, name: str) -> None:
        """Write beside, then rename: a kill in mid-write leaves the file before."""
        if not self.enabled or trainer.fast_dev_run or trainer.log_dir is None:  # type: ignore[attr-defined]
            return
        path = Path(trainer.log_dir) / FOLDER / name
        beside = path.with_suffix(".part")
        with _open_epoch(trainer):
            trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            os.replace(beside, path)
        trainer.strategy.barrier()


@contextmanager
def _open_epoch(trainer: Trainer) -> Iterator[None]:
    """Count the present epoch as going on, even if all its batches are done.

    At the end of a run the trainer counts it as over, also when `max_steps` cut it short; a run that goes on from there
    would leave out the rest of it, or all of the next one.
    """
    epochs = trainer.fit_loop.epoch_progress
    over = int(epochs.current.completed == epochs.current.ready)
    for counts in cast(Any, (epochs.total, epochs.current)):
        counts.processed -= over
        counts.completed -= over
    try:
        yield
    finally:
        for counts in cast(Any, (epochs.total, epochs.current)):
            counts.processed += over
            counts.completed += over
