"""`perception-r1`, which notes in a file when it comes to certain points: what a campaign's signals are aimed at.

The points are those at which something is computed, written or renamed; what is done there stays the same. On request
its disk is slow: whenever it opens a file to write, makes a folder, renames or synchronises, it waits first.
"""

import builtins
import io
import os
import sys
import time
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

PLACES = {
    "callbacks.before_after": {"_evaluate": "evaluation"},
    "callbacks.checkpoints": {"Checkpoints._write": "checkpoint", "replace": "renaming"},
    "callbacks.log_samples": {"sample_card": "drawing"},
    "callbacks.run_card": {"write_json": "run.json"},
    "commands.export": {"save_merged": "export", "model_card": "model card"},
    "commands.predict": {"_Writer._write": "prediction"},
    "data.convert": {"convert": "convert", "_save": "picture"},
    "data.fetch": {"_Fetcher._try": "fetch", "_write": "download"},
    "data.loading": {"BatchDataset.__getitem__": "loading"},
    "evaluation.callback": {"write_rows": "rows", "write_report": "report", "Evaluation.on_test_batch_end": "answers"},
    "modules.base": {"PolicyModule.phase": None},
    "modules.evaluation": {"EvaluationModule.validation_step": "validation"},
}
"""Module -> function -> name of the place; of a phase of a step it is the phase's own."""
MODULES = {
    "fit": [name for name in PLACES if not name.startswith(("commands", "data.convert", "data.fetch"))],
    "test": ["data.loading", "evaluation.callback", "modules.base"],
    "predict": ["commands.predict"],
    "export": ["commands.export"],
    "data": ["data.convert", "data.fetch"],
}
"""Modules of a verb in which points are marked."""


def main() -> int:
    """Run a command line."""
    if slow := os.environ.get("CAMPAIGN_SLOW_SECONDS"):
        slow_down(float(slow))
    marks = os.environ.get("CAMPAIGN_MARKS")
    if marks and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            mark_points(Path(marks), sys.argv[1])
        except KeyboardInterrupt:  # while it imports what the command would import itself
            return 130
    from perception_r1.cli import main as perception_r1

    return perception_r1()


def mark_points(marks: Path, verb: str) -> None:
    """From now on, write a line for every place that is come to."""
    handle, started = os.open(marks, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), time.monotonic()

    def note(place: str) -> None:
        os.write(handle, f"{time.monotonic() - started:.4f} {place}\n".encode())

    note("start")
    from perception_r1.cli import _quieten

    _quieten()
    for name in MODULES.get(verb, ()):
        module = import_module(f"perception_r1.{name}")
        for path, place in PLACES[name].items():
            owner_name, _, function = path.rpartition(".")
            owner = getattr(module, owner_name) if owner_name else module
            setattr(owner, function, _marked(getattr(owner, function), place, note))
    note("imported")


def slow_down(seconds: float) -> None:
    """From now on the disk takes its time."""
    opened = io.open

    def slow_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            time.sleep(seconds)
        return opened(file, mode, *args, **kwargs)

    builtins.open = io.open = slow_open  # type: ignore[assignment]
    for name in ("fsync", "mkdir", "rename", "replace"):
        setattr(os, name, _late(getattr(os, name), seconds))


def _late(function: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    @wraps(function)
    def late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(seconds)
        return function(*args, **kwargs)

    return late


def _marked(function: Callable[..., Any], place: str | None, note: Callable[[str], None]) -> Callable[..., Any]:
    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        note(place or args[1])
        return function(*args, **kwargs)

    return marked


if __name__ == "__main__":
    sys.exit(main())
