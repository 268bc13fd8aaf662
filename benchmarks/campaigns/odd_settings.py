"""Odd values for any setting of a training, through all that is done before its first step.

The options are those of the command line; the trainer's `fit` itself is left out. Each ends well, or in one sentence.
"""

import io
import os
import random
import signal
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from types import FrameType
from typing import Any

import yaml
from lightning.pytorch import Trainer

from campaigns.mutations import damaged_text
from perception_r1.cli import main as perception_r1

VALUES = (
    *("", "0", "-1", "1", "2", "0.5", "-0.1", "1.5", "1e-300", "1e300", "nan", "inf", "-inf", "null", "true", "false"),
    *("[]", "{}", "[1, 2]", "{a: 1}", "''", "x", "../x", "999999999999", "1_0", "0x10", "${model}", "${oc.env:NONE}"),
    *("!!python/object/apply:os.getcwd []", "{class_path: os.getcwd}", "grpo", "None", "\u0661", "a b", "-", "--", ":"),
)
"""Values on a command line."""
_TASKS = ("counting", "grounding", "detection", "ocr", "all")
_VARIANTS = ([], [], ["--variant", "lora"], ["--variant", "sft"], ["--variant", "modern"], ["--variant", "think"])
_CPU_SECONDS, _SECONDS = 60, 1800
"""More than this is a hang, of work or of waiting, also on a busy machine."""
_LEFT_OUT = ("trainer.num_nodes", "trainer.devices", "trainer.strategy", "data.init_args.num_workers")
"""Settings that start processes or wait for other machines."""


class Hang(BaseException):
    """It takes too long; no handler of an `Exception` swallows it."""


def try_setting(draw: random.Random) -> tuple[list[str], int | None, str | None]:
    """Set one option or two; the command line, its exit status, and what is wrong."""
    task = draw.choice(_TASKS)
    variant = draw.choice(_VARIANTS) if task != "all" else []
    base = ["fit", "--task", task, *variant, "--data.num_train=64"] if task != "all" else ["fit", "--task", task]
    options = []
    for name in draw.sample(_names(task, tuple(variant)), draw.choice((1, 1, 2))):
        value = draw.choice(VALUES) if draw.random() < 0.8 else damaged_text(draw.choice(VALUES), draw, VALUES)
        if draw.random() < 0.05:
            name = damaged_text(name, draw, ("x", ".", "class_path", "init_args"))
        options.append(f"--{name}={value}".replace("\x00", "").encode("utf-8", "replace").decode())
    argv = [*base, *options]
    status, output, fault = _run(argv)
    if fault is None and status == 2 and not (output.count("\n") == 1 and ": error: " in output):
        fault = f"is no single sentence: {output[-300:]!r}"
    if fault is None and status not in (0, 2):
        fault = f"ends with status {status}: {output[-300:]!r}"
    return argv, status, fault


def _run(argv: list[str]) -> tuple[int | None, str, str | None]:
    """Exit status, what is written to stderr, and what goes wrong."""
    errors = io.StringIO()
    before = dict(os.environ)
    with tempfile.TemporaryDirectory() as folder, chdir(folder), redirect_stdout(io.StringIO()):
        try:
            with redirect_stderr(errors), _without_fit(), _in_time():
                return perception_r1(argv), errors.getvalue(), None
        except Hang as hang:
            return None, errors.getvalue(), f"has not ended after {hang}"
        except (Exception, SystemExit) as error:
            return None, errors.getvalue(), " ".join(f"{type(error).__name__}: {error}".split())[:500]
        finally:
            os.environ.clear()
            os.environ.update(before)


def _names(task: str, variant: tuple[str, ...]) -> list[str]:
    """All options of a configuration."""
    if (task, variant) not in _KNOWN:
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(io.StringIO()), suppress(SystemExit):
            perception_r1(["fit", "--task", task, *variant, "--print_config"])
        found = list(_paths(yaml.safe_load(out.getvalue())))
        _KNOWN[task, variant] = [name for name in found if not name.startswith(_LEFT_OUT)]
    return _KNOWN[task, variant]


_KNOWN: dict[tuple[str, tuple[str, ...]], list[str]] = {}


def _paths(config: Mapping[str, Any], name: str = "") -> Iterator[str]:
    for key, value in config.items():
        path = f"{name}.{key}".lstrip(".")
        yield path
        if isinstance(value, Mapping):
            yield from _paths(value, path)


@contextmanager
def _without_fit() -> Iterator[None]:
    fit, Trainer.fit = Trainer.fit, lambda *args, **kwargs: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Trainer.fit = fit  # type: ignore[method-assign]


@contextmanager
def _in_time() -> Iterator[None]:
    timers = {
        signal.SIGPROF: (signal.ITIMER_PROF, _CPU_SECONDS, "of work"),
        signal.SIGALRM: (signal.ITIMER_REAL, _SECONDS, "on the clock"),
    }

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang(f"{timers[number][1]} seconds {timers[number][2]}")

    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds, _ in timers.values():
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for number, (timer, _, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
