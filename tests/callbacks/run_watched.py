"""Trains on two processes, one of which stands still in its second step; started by `test_watchdog.py`."""

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException

from perception_r1.callbacks.checkpoints import Checkpoints
from perception_r1.callbacks.watchdog import Watchdog
from tests.modules.toy import Numbers, Quick, make_trainer


class Standing(Quick):
    """In the second step one rank stands still in one phase, and the other waits for it in another."""

    def __init__(self, folder: Path, still: int, how: str) -> None:
        super().__init__()
        self.folder, self.still, self.how = folder, still, how

    def training_step(self, batch: list[Any], batch_idx: int) -> None:
        if self.global_step == 1 and self.global_rank == self.still and self.how != "terminated":
            with self.phase("decode"):
                time.sleep(2)  # the others hear of the phase
                if self.how == "failed":
                    raise ValueError("out of luck")
                if self.how == "stopped":
                    raise KeyboardInterrupt
                (self.folder / "pid").write_text(str(os.getpid()))
                time.sleep(600)
        if self.global_step == 1 and self.how == "terminated":
            for _ in range(3 if self.global_rank == self.still else 0):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)
            super().training_step(batch, batch_idx)
            return
        with self.phase("backward"):
            if self.global_step == 1 and self.how == "asleep":  # as one that waits in a library of its device
                time.sleep(600)
            self.trainer.strategy.reduce(torch.ones(1))
        super().training_step(batch, batch_idx)


class Saving(Callback):
    """What is stopped would save together with the others."""

    def on_exception(self, *args: Any) -> None:
        time.sleep(600)


def main(folder: str, still: str, how: str, seconds: str) -> None:
    torch.set_num_threads(1)
    if how == "silent":  # no process can be watched but by its silence
        del os.pidfd_open
    module = Standing(Path(folder), int(still), how)
    saving = Checkpoints() if how == "terminated" else Saving()
    trainer = make_trainer(Path(folder), [Watchdog(float(seconds)), saving], strategy="ddp", devices=2, max_steps=3)
    try:
        trainer.fit(module, datamodule=Numbers(module.task, num_train=8, batch_size=2))
    except SIGTERMException:
        sys.exit(f"stopped after {trainer.global_step} steps")


if __name__ == "__main__":
    main(*sys.argv[1:])
