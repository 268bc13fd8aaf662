"""One process of several that is gone: the others would wait for it, perhaps for ever, and end with a sentence instead.

Every process says once a second where it is. The first one hears them all, and the others hear the first one; so there
may be any number of them. A process that dies is noticed at once by those of its machine; one that stands still
altogether, or whose machine is gone, by its silence. Whoever notices tells all.
"""

import json
import os
import select
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Set
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from perception_r1.errors import UserError
from perception_r1.modules.signals import is_told_to_stop
from perception_r1.processes import end_with_parent

_INTERVAL = 1.0
"""Seconds between two signs of life."""

_GRACE = 10.0
"""Seconds that a process gets to end by itself where another one has failed: it may have failed in the same way."""

_VERDICT = "verdict"
"""Key under which all read what has happened; empty as long as nothing has."""

_CONNECTION_ERRORS = ("gloo", "nccl", "connection closed by peer", "connection reset by peer")
"""What the errors of torch.distributed say, in lower case, where another process is gone."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A sign of life.

    Attributes:
        number: It grows.
        machine: The same for processes that see each other's numbers.
        pid: Number of the process.
        where: Step and phase.
        state: "running"; "stopped" by a signal; "failed" with an error; "ended", of which there is nothing more to be
            heard.
    """

    number: int = 0
    machine: str
    pid: int
    where: str
    state: str = "running"


class Watchdog(Callback):
    """End this process, with a sentence that says who is missing and where, when another one of the run is gone.

    Args:
        seconds: A process on another machine is gone after so many seconds of silence; null does not watch at all.

    Raises:
        UserError: `seconds` is too short to tell silence from a busy machine.
    """

    def __init__(self, seconds: float | None = 30.0) -> None:
        if seconds is not None and seconds < 3 * _INTERVAL:
            raise UserError(f"watchdog.seconds is {seconds}; use {3 * _INTERVAL:g} or more, or null for none.")
        self.seconds = seconds
        self._watch: Watch | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to watch, before the model is loaded."""
        if self.seconds is None or trainer.world_size == 1 or self._watch is not None:
            return
        strategy: Any = trainer.strategy
        host, timeout = strategy.cluster_environment.main_address, timedelta(seconds=self.seconds)
        make = partial(TCPStore, host, timeout=timeout, wait_for_workers=False)
        store = make(port=0, is_master=True) if trainer.is_global_zero else None  # 0: any port that is free
        port = strategy.broadcast(None if store is None else store.port)
        self._watch = Watch(store or make(port=port, is_master=False), trainer, pl_module, self.seconds)
        strategy.barrier()
        self._watch.start()
        end_with_parent(None)  # from here on the watch says what has happened

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """All have come to the end."""
        if self._watch is not None:
            self._watch.end("ended")
            trainer.strategy.barrier()  # the store of the first process is needed until none reads it any more
            self._watch = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Tell the others; an error that says that another one is gone is left to the watch, which knows which."""
        if self._watch is None:
            return
        if isinstance(exception, KeyboardInterrupt | SystemExit):
            self._watch.stop()
            return
        if isinstance(exception, RuntimeError) and any(word in str(exception).lower() for word in _CONNECTION_ERRORS):
            self._watch.join(self._watch.seconds + _GRACE)
        self._watch.end("failed")


class Watch(threading.Thread):
    """Tells where this process is, and watches the others.

    Args:
        store: What all processes write to and read from; the first one holds it.
        trainer: The trainer of this process.
        module: Its module.
        seconds: See `Watchdog`.
    """

    def __init__(self, store: TCPStore, trainer: Trainer, module: LightningModule, seconds: float) -> None:
        super().__init__(daemon=True, name="watchdog")
        self.seconds = seconds
        self._store, self._trainer, self._module = store, trainer, module
        self._own, self._has_ended = trainer.global_rank, threading.Event()
        first = self._own - trainer.local_rank
        self._neighbours = {*range(first, first + trainer.num_devices)} - {self._own}
        watched = range(trainer.world_size) if self._own == 0 else [0]
        self._num_silent = dict.fromkeys({*watched} - {self._own}, 0)
        self._num_stopped: Counter[int] = Counter()
        self._seen: dict[int, Beat] = {}
        self._state = "running"
        self._beat = Beat(machine=_machine(), pid=os.getpid(), where=self._where())
        if self._own == 0:
            store.set(_VERDICT, "")
        self._tell()

    def run(self) -> None:
        """Until the end of the run, or of another process."""
        self._read(self._neighbours)
        handles = {handle: rank for rank in self._neighbours if (handle := self._handle(self._seen[rank])) is not None}
        poll = select.poll()
        for handle in handles:
            poll.register(handle, select.POLLIN)
        while not self._has_ended.is_set():
            events = [handle for handle, _ in poll.poll(_INTERVAL * 1000)]
            gone = {handles[handle] for handle in events}
            try:
                self._tell()
                verdict = self._read(gone)
            except RuntimeError:  # the first process held the store
                gone, verdict = gone | {0}, ""
            if verdict and not self._has_ended.is_set():
                self._end_process(verdict)
            if self._state == "running":
                self._judge(gone)
            for handle in events:
                poll.unregister(handle)
        for handle in handles:
            os.close(handle)

    def stop(self) -> None:
        """This process heeds a signal. All stop, each in its own time; one that got none ends, and this one with it."""
        self._state = "stopped"

    def end(self, state: str) -> None:
        """Watch no more, and let the others know."""
        if not self._has_ended.is_set():
            self._has_ended.set()
            self._state = state
            with suppress(RuntimeError):
                self._tell()

    def _tell(self) -> None:
        self._beat = replace(self._beat, number=self._beat.number + 1, where=self._where(), state=self._state)
        self._store.set(str(self._own), json.dumps(asdict(self._beat)))

    def _read(self, others: Set[int]) -> str:
        """Hear those that are watched, and others; returns the verdict."""
        ranks = sorted({*self._num_silent, *others})
        verdict, *values = self._store.multi_get([_VERDICT, *map(str, ranks)])
        for rank, value in zip(ranks, values, strict=True):
            beat = Beat(**json.loads(value))
            if rank in self._num_silent:
                is_new = rank not in self._seen or beat.number > self._seen[rank].number
                self._num_silent[rank] = 0 if is_new else self._num_silent[rank] + 1  # own rounds: a machine may sleep
            self._seen[rank] = beat
        return str(verdict, "utf-8")

    def _judge(self, gone: Set[int]) -> None:
        for rank, beat in self._seen.items():
            if beat.state == "ended" or self._has_ended.is_set():
                continue
            silence = self._num_silent.get(rank, 0) * _INTERVAL
            self._num_stopped[rank] += beat.state == "stopped"
            if beat.state == "stopped":
                is_alone = self._num_stopped[rank] * _INTERVAL >= self.seconds and not is_told_to_stop(self._trainer)
                what = "was stopped by a signal, and this one was not" if is_alone else ""
            elif beat.state == "failed":
                what = "stopped with an error, which its own output tells" if silence >= _GRACE else ""
            elif rank in gone:
                what = "is gone: it was killed, or it crashed"
            else:
                what = f"has given no sign of life for {silence:.0f} seconds" if silence >= self.seconds else ""
            if what:
                verdict = f"Rank {rank} {what}; it was last seen at {beat.where}"
                with suppress(RuntimeError):
                    self._store.set(_VERDICT, verdict)
                self._end_process(verdict)

    def _end_process(self, verdict: str) -> None:
        """The main thread may wait where no exception reaches it; one that was stopped has said so, or will not."""
        sys.stdout.flush()
        if self._state == "running":
            sys.stderr.write(
                f"\n{verdict}, and rank {self._own} waits at {self._where()}: the run stands still and ends here; "
                "--ckpt_path last goes on from the last checkpoint.\n"
            )
        sys.stderr.flush()
        if self._own == 0:
            time.sleep(2 * _INTERVAL)  # until the others have read the verdict too
        os._exit(1)

    def _where(self) -> str:
        """The step that is done next, and its phase."""
        trainer, stage = self._trainer, self._trainer.state.stage
        phase = getattr(self._module, "current_phase", None) if trainer.training else None
        return f"step {trainer.global_step}, {phase or (stage.value if stage is not None else 'start')}"

    def _handle(self, beat: Beat) -> int | None:
        """What becomes readable when a process of this machine ends; None of another one, or where there is no such."""
        if beat.machine != self._beat.machine or not hasattr(os, "pidfd_open"):
            return None
        try:
            return os.pidfd_open(beat.pid)
        except OSError:
            return None


def _machine() -> str:
    """Host and, in containers, the space of process numbers."""
    space = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {space.stat().st_ino if space.exists() else ''}"
