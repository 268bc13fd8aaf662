"""Two ways to show works in progress: bars that a terminal redraws, and plain lines for a file or another program."""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from rich import progress
from rich.console import Console, RenderableType
from rich.text import Text

_SPEED_SECONDS = 3600
"""Time left is estimated from the pace of the last hour: single steps differ, and validations belong to the run."""
_LINE_SHARE = 0.1
"""A plain line comes whenever such a share of the whole is done ..."""
_LINE_SECONDS = 1.0
"""... but not sooner than this after the line before."""


def open_display(console: Console, line_seconds: float) -> "Display":
    """Bars where the console can redraw them, else plain lines at most `line_seconds` apart."""
    return Bars(console) if console.is_interactive else Lines(console, line_seconds)


class Bars:
    """A bar per work and the metrics on a line below."""

    def __init__(self, console: Console) -> None:
        self._progress = _ProgressWithMetrics(
            progress.TextColumn("{task.description:<10}"),
            progress.BarColumn(bar_width=None),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            progress.TextColumn("left", style="cyan"),
            console=console,
            expand=True,
            speed_estimate_period=_SPEED_SECONDS,
        )
        self._works: dict[str, progress.TaskID] = {}
        self._progress.start()

    def start(self, name: str, done: int, total: int | None) -> None:
        """Add a bar of which `done` of `total` steps are done; the total of an endless work is None."""
        self.finish(name)
        self._works[name] = self._progress.add_task(name, total=total, completed=done)

    def advance(self, name: str, done: int, metrics: Mapping[str, float]) -> None:
        """Move a bar; metrics replace those shown before, no metrics leave them."""
        self._progress.update(self._works[name], completed=done)
        if metrics:
            labelled = (Text.assemble((f"{label} ", "dim"), f"{value:.4g}") for label, value in metrics.items())
            self._progress.metrics = Text("   ").join(labelled)

    def finish(self, name: str) -> None:
        """Remove a bar."""
        if name in self._works:
            self._progress.remove_task(self._works.pop(name))

    def close(self) -> None:
        """Draw the bars a last time and give the cursor back."""
        self._progress.stop()


class _ProgressWithMetrics(progress.Progress):
    """Rich's progress bars with one more line."""

    metrics = Text()

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.metrics:
            yield self.metrics


@dataclass(slots=True)
class _Work:
    """What plain lines know of one work."""

    done_at_start: int
    total: int | None
    started: float
    last_time: float
    last_share: float


class Lines:
    """A plain line now and then, for logs: at each tenth of the work, after some seconds, and at its end.

    Args:
        console: Where to write.
        line_seconds: Longest time between two lines while there is progress.
        clock: Seconds that only grow.
    """

    def __init__(self, console: Console, line_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._line_seconds, self._clock = console, line_seconds, clock
        self._works: dict[str, _Work] = {}

    def start(self, name: str, done: int, total: int | None) -> None:
        """Begin a work; its first line comes with progress."""
        now = self._clock()
        self._works[name] = _Work(done, total, started=now, last_time=now, last_share=done / total if total else 0.0)

    def advance(self, name: str, done: int, metrics: Mapping[str, float]) -> None:
        """Write a line when one is due."""
        work, now = self._works[name], self._clock()
        share = done / work.total if work.total else 0.0
        is_new_tenth = int(share / _LINE_SHARE + 1e-9) > int(work.last_share / _LINE_SHARE + 1e-9)
        waited = now - work.last_time
        if done != work.total and waited < self._line_seconds and not (is_new_tenth and waited >= _LINE_SECONDS):
            return
        work.last_time, work.last_share = now, share
        of_total = "" if work.total is None else f"/{work.total} ({100 * done // max(1, work.total)}%)"
        parts = [f"{name} {done}{of_total}", f"{_clock_time(now - work.started)} gone"]
        if work.total and done > work.done_at_start:
            pace = (now - work.started) / (done - work.done_at_start)
            parts.append(f"{_clock_time(pace * (work.total - done))} left")
        parts += [f"{label} {value:.4g}" for label, value in metrics.items()]
        self._console.print(", ".join(parts), soft_wrap=True, highlight=False, markup=False)

    def finish(self, name: str) -> None:
        """Forget a work; its last step has written its line."""
        self._works.pop(name, None)

    def close(self) -> None:
        """Forget all works."""
        self._works.clear()


Display = Bars | Lines
"""Something that shows several works in progress, each under a name."""


def _clock_time(seconds: float) -> str:
    return str(timedelta(seconds=round(max(0.0, seconds))))
