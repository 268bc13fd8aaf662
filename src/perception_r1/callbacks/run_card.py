"""`run.json`: everything that says what a run was and what came of it, on one page of JSON.

The seconds of a run that went on in its folder are those of all its parts; of one that was killed, those until its last
checkpoint.
"""

import os
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from perception_r1.callbacks.before_after import BeforeAfter
from perception_r1.callbacks.environment import git_state, hardware, versions
from perception_r1.callbacks.files import RUN_CARD, read_card, run_folder, write_json
from perception_r1.modules.signals import is_told_to_stop

if TYPE_CHECKING:
    from perception_r1.modules.evaluation import EvaluationModule

_TERMINATED = "stopped by SIGTERM"
_MAX_REASON = 300
"""Longest reason of a failure, in characters: the traceback is in the log."""


class RunCard(Callback):
    """Write `run.json` into the run's folder when a fit starts, and complete it when it ends, however it ends.

    A run that goes on keeps the one that it has until it trains: what is refused or has no step left changes nothing.
    """

    def __init__(self) -> None:
        self._has_begun = False
        self._path: Path | None = None
        self._card: dict[str, Any] = {}
        self._started = 0.0

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin that of a new run."""
        self._has_begun = False
        if trainer.ckpt_path is None:
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin that of a run that goes on."""
        if not self._has_begun:
            self._begin(trainer, pl_module)

    def _begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known before the first step; all devices come here together."""
        self._has_begun = True
        folder = run_folder(trainer)
        if folder is None or not trainer.is_global_zero:
            return
        self._path = folder / RUN_CARD
        earlier = read_card(folder) if trainer.ckpt_path is not None else {}
        seconds, commands = earlier.get("seconds"), earlier.get("earlier_commands")
        self._started = time.monotonic() - (seconds if isinstance(seconds, int | float) else 0.0)
        self._card = {"status": "running", "start": earlier.get("start") or now(), "end": None, "seconds": None}
        self._card |= set_up(trainer, pl_module)
        self._card["resumed_from"] = None if trainer.ckpt_path is None else str(trainer.ckpt_path)
        self._card["earlier_commands"] = [*(commands or []), earlier["command"]] if "command" in earlier else []
        write_json(self._path, self._card)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """A run that is killed goes on from here."""
        if self._path is not None:
            write_json(self._path, self._card | {"seconds": self._seconds()})

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Complete the card of a run that came to its end."""
        self._complete("finished", trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Complete the card of a run that was stopped or failed."""
        self._complete(_TERMINATED if is_told_to_stop(trainer) else status_of(exception), trainer, pl_module)

    def _complete(self, status: str, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._path is None:
            return
        self._card |= {"status": status, "end": now(), "seconds": self._seconds()}
        self._card |= {"data": _data(trainer), **_results(trainer, pl_module)}
        write_json(self._path, self._card)
        self._path = None

    def _seconds(self) -> float:
        return round(time.monotonic() - self._started, 3)


def status_of(exception: BaseException) -> str:
    r"""How a run ended that an exception ended, in one sentence.

    >>> status_of(ValueError("No images found.\nTry another folder."))
    'failed: ValueError: No images found.'
    """
    if isinstance(exception, SIGTERMException):
        return _TERMINATED
    if isinstance(exception, KeyboardInterrupt):
        return "stopped by Ctrl-C"
    lines = str(exception).strip().splitlines()
    reason = f"{type(exception).__name__}: {lines[0]}" if lines else type(exception).__name__
    return "failed: " + (reason if len(reason) <= _MAX_REASON else reason[:_MAX_REASON] + "...")


def set_up(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What a run or an evaluation consists of: all that decides what comes of it."""
    seed = os.environ.get("PL_GLOBAL_SEED")
    return {
        "command": sys.argv,
        "versions": versions(),
        "git": git_state(Path(__file__).parent),
        "hardware": hardware(),
        "trainer": {
            "strategy": type(trainer.strategy).__name__,
            "accelerator": type(trainer.accelerator).__name__,
            "devices": trainer.num_devices,
            "nodes": trainer.num_nodes,
            "precision": str(trainer.precision),
        },
        "seeds": {
            "everything": int(seed) if seed else None,
            "module": getattr(pl_module, "seed", None),
            "torch": torch.initial_seed(),
        },
        "data": _data(trainer),
        **cast("EvaluationModule", pl_module).describe(),
    }


def _results(trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
    """What came of it; seconds, the share of validations in them and skipped steps include those before a resume."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # its connector sets it
    metrics = next((callback for callback in callbacks if isinstance(callback, BeforeAfter)), None)
    return {
        "steps": trainer.global_step,
        "num_skipped_steps": getattr(pl_module, "num_skipped_steps", None),
        "validation_share": round(getattr(pl_module, "validation_share", 0.0), 4),
        "phase_seconds": {name: round(value, 3) for name, value in getattr(pl_module, "phase_seconds", {}).items()},
        "primary_metrics": [tag.removeprefix("test/") for tag in getattr(pl_module, "primary_test_metrics", ())],
        "before": dict(metrics.before) if metrics else {},
        "after": dict(metrics.after) if metrics else {},
        "margins_of_error": dict(metrics.margins) if metrics else {},
    }


def _data(trainer: Trainer) -> dict[str, Any] | None:
    """What determines the samples, and the splits that are set up by now."""
    data = getattr(trainer, "datamodule", None)
    if data is None or not hasattr(data, "fingerprint"):  # loaders, or a data module of someone else
        return None
    return {"fingerprint": data.fingerprint(), "splits": data.describe()}


def now() -> str:
    """The time in UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
