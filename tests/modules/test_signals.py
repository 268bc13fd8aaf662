"""A signal at any line of a run: what goes on from its checkpoint ends in the same weights and the same TensorBoard."""

import logging
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import loops
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors import signal_connector
from lightning.pytorch.trainer.connectors.logger_connector import logger_connector
from lightning.pytorch.utilities.exceptions import SIGTERMException
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from perception_r1 import __file__ as package
from perception_r1.callbacks import log_samples
from perception_r1.callbacks.checkpoints import Checkpoints, next_log_step
from perception_r1.callbacks.log_samples import LogSamples
from perception_r1.scoring import ScoredCompletion
from tests.modules.toy import Numbers, Quick, TwoUpdates, make_trainer

pytestmark = pytest.mark.slow

PACKAGE = Path(package).parent
TRACED = (
    *(str(Path(module.__file__)) for module in (call, logger_connector, signal_connector)),
    str(Path(loops.__file__).parent),
    *(str(PACKAGE / name) for name in ("callbacks", "data", "metrics", "modules/base.py", "modules/evaluation.py")),
)
"""Where a signal may arrive: in the trainer's loops, hooks and logs, and in what the package adds to them."""

FIRST, LAST = loops._FitLoop.on_run_start.__code__, loops._FitLoop.run.__code__
"""Signals arrive from the beginning of the first of these functions to the end of the last."""


@dataclass
class Plan:
    """How a run goes: four steps; three batches an epoch, a validation after the second and after the last of them."""

    kind: type[Quick] = Quick
    num_workers: int = 0
    num_batches: int = 3
    options: dict[str, Any] = field(default_factory=dict)


def run(folder: Path, plan: Plan, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    """A run or the rest of one, in the same folder; returns the weights in which it ends."""
    purge = {} if ckpt_path is None else {"purge_step": next_log_step(ckpt_path)}
    logger = TensorBoardLogger(folder, name="", version="run", **purge)
    options = {"max_steps": 4 * plan.kind.updates_per_batch.fget(None), "logger": logger, "limit_val_batches": 1.0}
    options |= {"val_check_interval": 2, "check_val_every_n_epoch": None} | plan.options
    trainer = make_trainer(folder, [LogSamples(1, 64), Checkpoints()], **options)
    module = plan.kind()
    data = Numbers(module.task, num_train=2 * plan.num_batches, num_val=2, batch_size=2, num_workers=plan.num_workers)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return {name: value.detach().clone() for name, value in module.policy.state_dict().items()}


@dataclass(frozen=True)
class Point:
    """The moment before a line is run for the n-th time."""

    file: str
    line: int
    visit: int
    function: str = field(compare=False)

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}, visit {self.visit}"


@contextmanager
def watching(see: Callable[[Point], None]) -> Iterator[None]:
    """Call something before every traced line; workers that are forked meanwhile are left alone."""
    visits: Counter[tuple[str, int]] = Counter()
    is_on, process = False, os.getpid()

    def on_line(frame: Any, event: str, argument: Any) -> Any:
        nonlocal is_on
        if event == "line" and is_on:
            place = (frame.f_code.co_filename, frame.f_lineno)
            visits[place] += 1
            see(Point(*place, visits[place], frame.f_code.co_name))
        if event == "return" and frame.f_code is LAST:
            is_on = False
        return on_line

    def on_call(frame: Any, event: str, argument: Any) -> Any:
        nonlocal is_on
        if not frame.f_code.co_filename.startswith(TRACED) or os.getpid() != process:
            return None
        is_on = is_on or frame.f_code is FIRST
        return on_line

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield
    finally:
        sys.settrace(before)


def interrupt(folder: Path, plan: Plan, point: Point, number: int) -> bool:
    """A run, or the rest of one, into which a signal comes; whether the point was reached."""
    reached: list[Point] = []

    def see(here: Point) -> None:
        if here == point and not reached:
            reached.append(here)
            signal.raise_signal(number)  # SIGINT raises an exception here, SIGTERM is noted by the trainer

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with watching(see), suppress(SystemExit, SIGTERMException):
            run(folder, plan, last(folder) if last(folder).exists() else None)
    finally:
        signal.signal(signal.SIGINT, before)
    return bool(reached)


def shown(folder: Path) -> dict[str, list[Any]]:
    """What TensorBoard shows of a run, without times: its metrics and images with their steps."""
    events = EventAccumulator(str(folder / "run"), size_guidance={"scalars": 0, "images": 0}, purge_orphaned_data=True)
    tags = events.Reload().Tags()
    scalars = [tag for tag in tags["scalars"] if "seconds" not in tag and "memory" not in tag]
    metrics = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in scalars}
    images = {tag: [(event.step, event.encoded_image_string) for event in events.Images(tag)] for tag in tags["images"]}
    return {tag: sorted(values) for tag, values in (metrics | images).items()}


def last(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "last.ckpt"


def best(folder: Path) -> tuple[int, float]:
    checkpoint = torch.load(folder / "run" / "checkpoints" / "best.ckpt")
    return checkpoint["global_step"], float(sum(value.sum() for value in checkpoint["state_dict"].values()))


@dataclass
class Whole:
    """An uninterrupted run, and all the points that it passes."""

    plan: Plan
    weights: dict[str, torch.Tensor]
    shown: dict[str, list[Any]]
    best: tuple[int, float]
    points: list[Point]
    resumed: dict[str, str | None] = field(default_factory=dict)  # what is wrong after resuming from such a folder


def whole_run(folder: Path, plan: Plan) -> Whole:
    """Run twice: imports and caches of the first time are no lines of a run."""
    points: list[Point] = []
    for attempt in ("first", "second"):
        points.clear()
        with watching(points.append):
            weights = run(folder / attempt, plan)
    return Whole(plan, weights, shown(folder / "second"), best(folder / "second"), points)


def fault(folder: Path, whole: Whole, signals: Sequence[tuple[Point, int]]) -> str | None:
    """What is wrong with a run that was stopped at these points, one after another, and then went on to its end."""
    event_file_writer._global_uid = event_file_writer.AtomicCounter(0)  # files are read in the order of their names
    shutil.rmtree(folder, ignore_errors=True)
    for point, number in signals:
        if not interrupt(folder, whole.plan, point, number) and point == signals[0][0]:
            return "is not reached"
    if not last(folder).exists():
        return None  # nothing to go on from: it starts anew
    state = torch.load(last(folder))
    weights = [value.tolist() for value in state["state_dict"].values()]
    key = repr((weights, state["global_step"], state["loops"], state["callbacks"], shown(folder)))
    if key not in whole.resumed:
        whole.resumed[key] = resumed_fault(folder, whole)
    return whole.resumed[key]


def resumed_fault(folder: Path, whole: Whole) -> str | None:
    """What is wrong with a run that goes on to its end."""
    weights = run(folder, whole.plan, last(folder))
    metrics = shown(folder)
    tags = [tag for tag in whole.shown | metrics if metrics.get(tag) != whole.shown.get(tag)]
    changed = [name for name, value in whole.weights.items() if not torch.equal(weights[name], value)]
    faults = [*changed, *tags, *(["best.ckpt"] if best(folder) != whole.best else [])]
    return ", ".join(faults) if faults else None


def faults(folder: Path, whole: Whole, points: Sequence[Point], number: int) -> dict[str, str]:
    """The points at which a signal alters the run."""
    found = {str(point): fault(folder, whole, [(point, number)]) for point in points}
    return {point: name for point, name in found.items() if name is not None}


def once_each(points: Sequence[Point]) -> list[Point]:
    """Every line once, in the middle of the run."""
    visits = Counter((point.file, point.line) for point in points)
    return [point for point in points if point.visit == visits[point.file, point.line] // 2 + 1]


def thinned(points: Sequence[Point], stride: int = 8) -> list[Point]:
    """All in the package and where the trainer fetches and counts batches, one of so many elsewhere."""
    near = (str(PACKAGE), *(str(Path(loops.__file__).parent / name) for name in ("training", "fit", "fetch")))
    others = [point for point in points if not point.file.startswith(near)]
    return [point for point in points if point.file.startswith(near)] + others[::stride]


def small_card(task: Any, scored: ScoredCompletion, *, step: int, panel_width: int) -> Image.Image:
    return Image.new("RGB", (4, 4), (step, int(scored.score.components["luck"] * 100) + 128, 0))


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Without what takes most of the time: drawing, and lines of two loggers."""
    monkeypatch.setattr(log_samples, "sample_card", small_card)
    for name in ("lightning.pytorch", "tensorboard"):
        monkeypatch.setattr(logging.getLogger(name), "level", logging.ERROR)


INSIDE = Plan()
"""A validation in the middle of an epoch, the end of an epoch without one, and a validation at the end of the run."""
BORDER = Plan(num_batches=2)
"""Every epoch ends with a validation."""
TWO = Plan(kind=TwoUpdates)
EPOCHS = Plan(num_batches=2, options={"max_epochs": 2, "max_steps": -1})
ALL = [INSIDE, BORDER, TWO, EPOCHS, Plan(options={"log_every_n_steps": 3}), Plan(options={"val_check_interval": 1})]


def test_ctrl_c_at_any_line_alters_neither_weights_nor_tensorboard(tmp_path):
    whole = whole_run(tmp_path / "whole", INSIDE)
    points = thinned(once_each(whole.points))
    assert len(points) > 400
    assert faults(tmp_path / "run", whole, points, signal.SIGINT) == {}


@pytest.mark.parametrize("plan", ALL[1:])
def test_signals_alter_no_other_run_either(tmp_path, plan):
    whole = whole_run(tmp_path / "whole", plan)
    points = once_each(whole.points)
    assert faults(tmp_path / "run", whole, points[::41], signal.SIGINT) == {}


@pytest.mark.parametrize("plan", [INSIDE, TWO])
def test_a_kill_at_any_line_alters_nothing(tmp_path, plan):
    """What is on the disk then is gone on from."""
    whole = whole_run(tmp_path / "whole", plan)
    killed, states = tmp_path / "killed", []

    def see(point: Point) -> None:
        state = {path: path.stat().st_size for path in killed.rglob("*.*")}
        if not states or state != states[-1]:
            shutil.copytree(killed, tmp_path / str(len(states)))
            states.append(state)

    with watching(see):
        run(killed, plan)
    folders = [tmp_path / str(index) for index in range(len(states)) if last(tmp_path / str(index)).exists()]
    assert len(folders) > 5
    assert [resumed_fault(folder, whole) for folder in folders] == [None] * len(folders)


@pytest.mark.parametrize("plan", ALL[1:3])
def test_a_step_goes_to_its_end_after_sigterm(tmp_path, plan):
    whole = whole_run(tmp_path / "whole", plan)
    assert faults(tmp_path / "run", whole, whole.points[::331], signal.SIGTERM) == {}


@pytest.mark.hours
@pytest.mark.parametrize("plan", ALL)
def test_a_signal_at_every_single_moment_alters_nothing(tmp_path, plan):
    whole = whole_run(tmp_path / "whole", plan)
    assert faults(tmp_path / "run", whole, whole.points, signal.SIGINT) == {}


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_that_prepare_batches_ahead_change_nothing(tmp_path, num_workers):
    whole = whole_run(tmp_path / "whole", Plan(num_workers=num_workers))
    points = [point for point in once_each(whole.points) if "data/loading" in point.file or "fetchers" in point.file]
    assert len(points) > 20
    assert faults(tmp_path / "run", whole, points[num_workers :: 5 * num_workers], signal.SIGINT) == {}


@pytest.mark.parametrize("name", ["_evaluation_step", "advance", "on_train_batch_start"])
def test_a_run_may_be_stopped_again_and_again(tmp_path, name):
    """The first time in a validation, before or in a step, then anywhere: the validation may be cut again."""
    whole, points = whole_run(tmp_path / "whole", INSIDE), []
    first = next(point for point in whole.points[len(whole.points) // 3 :] if point.function == name)
    assert interrupt(tmp_path / "run", INSIDE, first, signal.SIGINT)
    with watching(points.append):
        run(tmp_path / "run", INSIDE, last(tmp_path / "run"))
    rounds = [[first, second, second] for second in once_each(points)[::47]]
    found = [fault(tmp_path / "run", whole, [(point, signal.SIGINT) for point in stops]) for stops in rounds]
    assert len(found) > 10
    assert found == [None] * len(found)
