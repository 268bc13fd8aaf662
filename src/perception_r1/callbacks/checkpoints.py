"""The checkpoints of a run: `last.ckpt`, to go on from, and `best.ckpt`, to use: weights alone.

While a run goes on, `previous.ckpt` is the `last.ckpt` before: writing the next one needs the room of two anyway. It is
removed when the next one is begun, and at the end of the run; what takes its place is on the disk by then.
"""

import logging
import math
import os
import shutil
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from perception_r1.callbacks.files import run_folder
from perception_r1.engines.base import EngineError
from perception_r1.errors import UserError
from perception_r1.modules.evaluation import EvaluationModule
from perception_r1.policy.checkpoint import is_checkpoint, read_meta, verify
from perception_r1.policy.checkpoint_file import DamagedCheckpointError

FOLDER = "checkpoints"
"""Folder of a run in which its checkpoints lie."""
LAST, BEST, PREVIOUS = "last.ckpt", "best.ckpt", "previous.ckpt"
DAMAGED = "damaged.ckpt"
"""What was `last.ckpt` before a training went on from the one before."""

_log = logging.getLogger(__name__)


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
        """Save the end of the run; it needs no checkpoint before."""
        if self._position is not None:
            self._save(trainer)
            self._remove_previous(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save where the run was stopped, if that was not within a step; a validation that was cut will be repeated."""
        is_everywhere = isinstance(exception, EngineError | KeyboardInterrupt | SystemExit)
        if not is_everywhere and pl_module.device_mesh is not None:
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
        self._remove_previous(trainer)
        if self._is_best_due:
            self._write(trainer, BEST)
            self._is_best_due = False
        self._write(trainer, LAST)

    def _write(self, trainer: Trainer, name: str) -> None:
        """Write beside, then rename: a kill in mid-write leaves the checkpoint before."""
        folder = self._folder(trainer)
        if folder is None:
            return
        path = folder / name
        beside = path.with_suffix(".part")
        if trainer.is_global_zero:
            _remove(beside)  # what a run that was killed has left of one
        trainer.save_checkpoint(beside, weights_only=name == BEST)
        if trainer.is_global_zero:
            if name == BEST:
                _sync(beside)  # the one before is gone at once
            replace(path, beside, kept=folder / PREVIOUS if name == LAST else None)
        trainer.strategy.barrier()

    def _remove_previous(self, trainer: Trainer) -> None:
        """Make room; what came after it has been written a while ago, so it is on the disk without a wait."""
        folder = self._folder(trainer)
        if folder is not None and trainer.is_global_zero and is_checkpoint(folder / LAST):
            _sync(folder / LAST)
            _remove(folder / PREVIOUS)

    def _folder(self, trainer: Trainer) -> Path | None:
        """Where checkpoints are written, if they are."""
        is_kept, folder = self.enabled and not trainer.fast_dev_run, run_folder(trainer)  # type: ignore[attr-defined]
        return folder / FOLDER if is_kept and folder is not None else None


def replace(path: Path, new: Path, *, kept: Path | None = None) -> None:
    """Let a file or a folder take the place of another at once: the name of a folder is a link to it.

    Args:
        path: The name.
        new: What gets it.
        kept: The name that the other one keeps; None: it is removed.
    """
    old = path.resolve() if path.is_symlink() else None
    if new.is_dir():
        linked = {link.resolve() for link in path.parent.iterdir() if link.is_symlink()}
        home = next(each for number in count() if (each := path.with_suffix(f".{number}").resolve()) not in linked)
        _remove(home)
        new.rename(home)
        new.symlink_to(home.name)
    if kept is not None:
        _keep(path, kept)
    os.replace(new, path)
    if old is not None and kept is None:
        shutil.rmtree(old)


def find_last(path: Path) -> Path:
    """A run's `last.ckpt`, or the one before where that is damaged or gone, which a warning says.

    Raises:
        DamagedCheckpointError: Neither is whole.
        UserError: One cannot be read.
    """
    try:
        verify(path)
        return path
    except DamagedCheckpointError as error:
        problem = error
    previous = path.with_name(PREVIOUS)
    if not is_checkpoint(previous):
        raise problem
    verify(previous)
    step = read_meta(previous)["global_step"]
    _log.warning("%s The checkpoint before it is used: %s, of step %d.", problem, previous, step)
    return previous


def repair_last(path: Path) -> None:
    """Give the checkpoint before the place of a `last.ckpt` that is damaged, which is kept as `damaged.ckpt`.

    So all processes of a training go on from the same one, and the only good one is not removed by the next.

    Raises:
        UserError: As `find_last`, or the folder cannot be written to.
    """
    found = find_last(path)
    if found != path:
        try:
            _remove(path.with_name(DAMAGED))
            if path.exists() or path.is_symlink():
                os.replace(path, path.with_name(DAMAGED))
            os.replace(found, path)
        except OSError as error:
            raise UserError(f"{found} cannot be renamed to {path.name}: {error.strerror}.") from error


def _keep(path: Path, kept: Path) -> None:
    """Give what has a name another one besides, so that the first is never free."""
    _remove(kept)
    if path.is_symlink():
        kept.symlink_to(path.readlink())
    elif path.exists():
        try:
            os.link(path, kept)
        except OSError:  # a disk without hard links
            os.replace(path, kept)


def _remove(path: Path) -> None:
    """Remove a file, a folder, or a link, with its folder if it is the last one to it."""
    if path.is_symlink():
        folder = path.resolve()
        path.unlink()
        if any(link.is_symlink() and link.resolve() == folder for link in path.parent.iterdir()):
            return
        path = folder
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Wait until a checkpoint is on the disk."""
    for file in path.iterdir() if path.is_dir() else [path]:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def next_log_step(path: Path) -> int:
    """The step under which a run that goes on from a checkpoint logs next: batches count, not their updates."""
    checkpoint = read_meta(path)
    num_batches = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"]
    return int(num_batches) - (checkpoint["callbacks"]["Checkpoints"].get("cut") is not None)


def _logged_metrics(trainer: Trainer) -> dict[str, float]:
    """What was logged of the last step."""
    every = trainer.log_every_n_steps  # type: ignore[attr-defined]
    is_logged = every > 0 and (trainer.fit_loop.total_batch_idx + 1) % every == 0
    metrics = trainer.logged_metrics | {"epoch": trainer.current_epoch}
    return {tag: float(metrics[tag]) for tag in metrics if is_logged and tag.startswith(("train/", "epoch"))}
