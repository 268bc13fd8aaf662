"""The two checkpoints of a run: `last.ckpt`, to go on from, and `best.ckpt`, to use: weights alone."""

import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from perception_r1.engines.base import EngineError
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.policy.sharded_checkpoint import is_sharded, load_meta

FOLDER = "checkpoints"
"""Folder of a run in which its checkpoints lie."""


class Position(NamedTuple):
    """A position between two batches: done are `num_batches` of an epoch that goes on, and `total` of all epochs."""

    epoch: int
    num_batches: int
    total: int

    def counters(self) -> dict[str, Any]:
        """The trainer's counters there; a signal finds its own anywhere on the way to the next one."""
        names = ("ready", "started", "processed", "completed")
        epochs = dict.fromkeys(names[:2], self.epoch + 1) | dict.fromkeys(names[2:], self.epoch)
        total, current, none = (dict.fromkeys(names, count) for count in (self.total, self.num_batches, 0))
        return {
            "epoch_progress": {"total": epochs, "current": epochs},
            "epoch_loop.batch_progress": {"total": total, "current": current, "is_last_batch": False},
            "epoch_loop.val_loop.batch_progress": {"total": none, "current": none, "is_last_batch": False},
        }


class Checkpoints(Checkpoint):
    """Saves after each validation, at the end, and when a run is stopped between two steps or in a validation.

    A checkpoint always stands between two batches, with all updates of a rollout done and logged, so that going on from
    it is exact. A run that dies in the middle of a step therefore keeps the checkpoint before. One whose engine fails
    has changed nothing in that step yet, and saves what was before it.

    Args:
        enabled: Write checkpoints at all.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.best_value = -math.inf
        self._is_best_due = False
        self._position: Position | None = None  # after the batch that was begun last
        self._begun: Position | None = None  # before it
        self._is_exact = False  # weights, logs and position agree
        self._cut: dict[str, float] | None = None  # the metrics of a step whose validation is not over

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Repeat the validation in which the run was stopped, and log its step again: TensorBoard forgot both."""
        if self._cut is None:
            return
        loop, trainer.validating = trainer.fit_loop.epoch_loop, True
        loop.manual_optimization.optim_step_progress.total.completed += 1
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.log_metrics(self._cut, loop.total_batch_idx)
        loop.val_loop.run()
        loop.val_loop._has_run = False  # else a trainer at the end of an epoch would never begin the next
        trainer.training, self._cut = True, None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """From here on weights, logs and position disagree."""
        self._is_exact = False
        loop = trainer.fit_loop.epoch_loop
        self._begun = Position(trainer.current_epoch, loop.batch_idx, loop.total_batch_idx)
        self._arrive(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The step is logged; a run that is stopped from here on repeats the validation."""
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self._arrive(trainer)
            self._cut = _logged_metrics(trainer) if self._cut is None else self._cut
            self._is_exact = True

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From here on the validation is logged."""
        self._is_exact = False

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save `best.ckpt` when the task's primary metric has improved, and `last.ckpt` in any case."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        value = trainer.callback_metrics.get(cast(EvaluationModule, pl_module).monitor)
        if isinstance(value, Tensor) and float(value) > self.best_value:
            self.best_value, self._is_best_due = float(value), True
        self._cut = None
        self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the end of the run."""
        if self._position is not None:
            self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run was stopped, if that was not within a step; a validation that was cut will be repeated."""
        is_error = not isinstance(exception, KeyboardInterrupt | SystemExit)
        if is_error and pl_module.device_mesh is not None:
            return  # the other devices, which have the rest of the weights, are still elsewhere
        if isinstance(exception, EngineError) and not self._is_exact and self._begun is not None and self._begun.total:
            self._position = self._begun
            self._save(trainer)
        elif trainer.state.fn == TrainerFn.FITTING and self._position is not None:
            num_over = trainer.fit_loop.epoch_loop._batches_that_stepped  # counted last, after log and validation
            if self._is_exact or num_over == self._position.total:
                self._save(trainer)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Write the position instead of the counters, unless another callback saves in the middle of a step."""
        if self._position is not None and self._is_exact:
            checkpoint["epoch"], loops = self._position.epoch, checkpoint["loops"]["fit_loop"]
            loops |= self._position.counters()
            if self._cut is not None:  # a trainer whose steps are all done would not start
                loops["epoch_loop.manual_optimization.optim_step_progress"]["total"]["completed"] -= 1

    def state_dict(self) -> dict[str, Any]:
        """The best metric so far, and a cut validation."""
        return {"best_value": self.best_value, "cut": self._cut}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best metric so far, and a cut validation."""
        self.best_value = state_dict["best_value"]
        self._cut = state_dict.get("cut")

    def _arrive(self, trainer: Trainer) -> None:
        """Note the position behind the batch that begins, and log under its index: a resumed trainer may be off."""
        loop = trainer.fit_loop.epoch_loop
        loop._batches_that_stepped = loop.total_batch_idx
        self._position = Position(trainer.current_epoch, loop.batch_idx + 1, loop.total_batch_idx + 1)

    def _save(self, trainer: Trainer) -> None:
        """Write what is due; a run that is stopped meanwhile does it again."""
        self._is_exact = True
        if self._is_best_due:
            self._write(trainer, "best.ckpt")
            self._is_best_due = False
        self._write(trainer, "last.ckpt")

    def _write(self, trainer: Trainer, name: str) -> None:
        """Write beside, then rename: a kill in mid-write leaves the checkpoint before."""
        if not self.enabled or trainer.fast_dev_run or trainer.log_dir is None:  # type: ignore[attr-defined]
            return
        path = Path(trainer.log_dir) / FOLDER / name
        beside = path.with_suffix(".part")
        if trainer.is_global_zero:
            _remove(beside)  # what a run that was killed has left of one
        trainer.save_checkpoint(beside, weights_only=name == "best.ckpt")
        if trainer.is_global_zero:
            replace(path, beside)
        trainer.strategy.barrier()


def replace(path: Path, new: Path) -> None:
    """Let a file or a folder take the place of another at once: the name of a folder is a link to it."""
    old = path.resolve() if path.is_symlink() else None
    if new.is_dir():
        home = next(each for number in (0, 1) if (each := path.with_suffix(f".{number}").resolve()) != old)
        _remove(home)
        new.rename(home)
        new.symlink_to(home.name)
    os.replace(new, path)
    if old is not None:
        shutil.rmtree(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def next_log_step(path: Path) -> int:
    """The step under which a run that goes on from a checkpoint logs next: batches count, not their updates."""
    checkpoint = load_meta(path) if is_sharded(path) else torch.load(path, mmap=True, weights_only=True)
    num_batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    return int(num_batches) - (checkpoint["callbacks"]["Checkpoints"].get("cut") is not None)


def _logged_metrics(trainer: Trainer) -> dict[str, float]:
    """What was logged of the last step."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_logged = every > 0 and (trainer.fit_loop.total_batch_idx + 1) % every == 0
    metrics = trainer.logged_metrics | {"epoch": trainer.current_epoch}
    return {tag: float(metrics[tag]) for tag in metrics if is_logged and tag.startswith(("train/", "epoch"))}
