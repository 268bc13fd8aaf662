"""`perception-r1` as a process of its own, with a mark for every place that it comes to, and signals to it.

The process leads a group of its own. It has the signal handlers of one that was started at a terminal, whatever this
process inherited from `nohup` or `&`.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

MARKS, SLOW = "CAMPAIGN_MARKS", "CAMPAIGN_SLOW_SECONDS"
"""Variables that tell `marked.py` where to note points, and how long its disk takes."""
ROOT = Path(__file__).resolve().parents[2]
_MARKED = Path(__file__).with_name("marked.py")
_POLL_SECONDS = 0.003
_CALM_SECONDS = 20.0
"""Until the last process of a group has to be gone after the first: workers look after their parent every few."""


@dataclass(kw_only=True)
class Running:
    """A command that goes on.

    Attributes:
        process: The first one of its group.
        marks: File of the points that it came to.
        output: File of what it wrote to stdout and stderr.
        started: When, in seconds.
    """

    process: "subprocess.Popen[bytes]"
    marks: Path
    output: Path
    started: float = field(default_factory=time.monotonic)

    def points(self) -> list[tuple[float, str]]:
        """The points that it came to, with seconds since the first of them: all but the first come after imports."""
        lines = self.marks.read_text(encoding="utf-8").splitlines() if self.marks.exists() else []
        return [(float(when), place) for when, place in (line.split(" ", 1) for line in lines)]

    def text(self) -> str:
        """What it wrote."""
        return self.output.read_text(encoding="utf-8", errors="replace")

    def last_line(self) -> str:
        """The last of it that is not blank."""
        lines = self.text().strip().splitlines()
        return lines[-1][:300] if lines else "no output"

    def wait(self, seconds: float) -> int | None:
        """The exit status; None where it does not end in time, and is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.send(signal.SIGKILL, "group")
            self.process.wait()
            return None

    def wait_until(self, is_reached: Callable[[], bool], seconds: float) -> bool:
        """Whether something was reached before the process ended."""
        end = time.monotonic() + seconds
        while self.process.poll() is None and time.monotonic() < end:
            if is_reached():
                return True
            time.sleep(_POLL_SECONDS)
        return False

    def send(self, number: signal.Signals, receiver: str) -> bool:
        """Send a signal to the "first" process, to another one of its "group" or to all; whether there was one."""
        if self.process.poll() is not None:
            return False
        with suppress(ProcessLookupError):
            others = [pid for pid in self.group() if pid != self.process.pid]
            if receiver == "group":
                os.killpg(self.process.pid, number)
            else:
                os.kill(others[0] if receiver == "other" and others else self.process.pid, number)
            return True
        return False

    def group(self) -> list[int]:
        """The processes of the group that are alive, the oldest first."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError, IndexError):
                state, _, group = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(stat.parent.name))
        return sorted(found)

    def left_behind(self) -> list[int]:
        """Processes of the group that outlive the first one for long; they are killed."""
        end = time.monotonic() + _CALM_SECONDS
        while (left := self.group()) and time.monotonic() < end:
            time.sleep(0.05)
        if left:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        return left


def start(
    argv: Sequence[str], folder: Path, *, name: str = "command", variables: Mapping[str, str] | None = None
) -> Running:
    """Start `perception-r1` in a folder; on one thread, so that the same command computes the same bits.

    Args:
        argv: Its command line.
        folder: Working directory.
        name: Of the files beside the folder that take its output and its marks.
        variables: Of the environment, besides those of this process.
    """
    marks, output = folder.parent / f"{name}.marks", folder.parent / f"{name}.txt"
    marks.unlink(missing_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "200", MARKS: str(marks)} | dict(variables or {})
    paths = [str(ROOT / "src"), str(ROOT / "benchmarks"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment.pop("PL_GLOBAL_SEED", None)
    with output.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", str(_MARKED), *argv],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=written,
            stderr=written,
            start_new_session=True,
            preexec_fn=_restore_signals,
        )
    return Running(process=process, marks=marks, output=output)


def _restore_signals() -> None:
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
