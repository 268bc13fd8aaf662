"""A callback that notes what a training takes: memory, descriptors, threads and CPU time."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch import Callback, LightningModule, Trainer

_PAGE = os.sysconf("SC_PAGE_SIZE")


class Footprint(Callback):
    """Write a line every few steps.

    Args:
        file: Where to.
        every: Steps from one line to the next.
    """

    def __init__(self, file: Path, every: int = 10) -> None:
        self.file, self.every = Path(file), every
        self._lines: TextIO | None = None
        self._cpu = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the file."""
        self._lines = self.file.open("w", encoding="utf-8")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Only steps count, not what is between them."""
        self._started = time.process_time()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Note what there is."""
        self._cpu += time.process_time() - self._started
        if trainer.global_step % self.every == 0 and self._lines is not None:
            line = {"step": trainer.global_step, "cpu_seconds": self._cpu / self.every, **footprint()}
            self._lines.write(json.dumps(line) + "\n")
            self._lines.flush()
            self._cpu = 0.0


def footprint() -> dict[str, int]:
    """Resident and private memory in bytes, open descriptors and threads of this process."""
    _, resident, shared = map(int, Path("/proc/self/statm").read_text(encoding="utf-8").split()[:3])
    return {
        "resident": resident * _PAGE,
        "private": (resident - shared) * _PAGE,
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
    }
