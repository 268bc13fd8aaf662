"""The progress callback in a trainer."""

import io
from pathlib import Path
from typing import Any

import pytest
import rich
from rich.console import Console

from perception_r1.callbacks.progress import Progress
from tests.callbacks.toy import ToyData, ToyModule, toy_trainer


def fit(folder: Path, progress: Progress, **options: Any) -> None:
    toy_trainer(folder, [progress], **options).fit(ToyModule(), datamodule=ToyData())


def test_a_file_gets_plain_lines_with_metrics(tmp_path: Path, console: Console):
    fit(tmp_path, Progress(plain_seconds=0.0), max_epochs=2)
    lines = console.file.getvalue().splitlines()
    training = [line for line in lines if line.startswith("training")]
    assert len(training) == 8
    assert training[0].startswith("training 1/8 (12%)")
    assert training[-1].startswith("training 8/8 (100%)")
    assert training[-1].endswith("reward 7.5, kl 0.01")
    assert sum(line.startswith("validation 3/3") for line in lines) == 4
    assert "\x1b" not in console.file.getvalue()


def test_max_steps_is_the_total_where_it_is_set(tmp_path: Path, console: Console):
    fit(tmp_path, Progress(metrics=["train/reward/format"]), max_epochs=-1, max_steps=3)
    assert "training 3/3 (100%)" in console.file.getvalue()
    assert console.file.getvalue().rstrip().endswith("reward/format 1")


def test_an_endless_fit_shows_steps_only(tmp_path: Path, console: Console):
    class Stop(ToyModule):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = True

    toy_trainer(tmp_path, [Progress(plain_seconds=0.0)], max_epochs=-1).fit(Stop(), datamodule=ToyData())
    assert "training 4, " in console.file.getvalue()


@pytest.mark.parametrize(
    ("verb", "name", "options"),
    [
        ("validate", "validation", {"verbose": False}),
        ("test", "test", {"verbose": False}),
        ("predict", "prediction", {"return_predictions": False}),
    ],
)
def test_evaluation_has_its_own_progress(
    verb: str, name: str, options: dict[str, bool], tmp_path: Path, console: Console
):
    getattr(toy_trainer(tmp_path, [Progress()]), verb)(ToyModule(), datamodule=ToyData(), **options)
    assert f"{name} 3/3 (100%)" in console.file.getvalue()


def test_a_terminal_gets_bars_and_is_left_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    monkeypatch.setattr(rich, "_console", terminal)
    fit(tmp_path, Progress())
    text = terminal.file.getvalue()
    assert "4/4" in text
    assert "reward 3.5" in text
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") > 0  # the cursor comes back


def test_a_failure_leaves_the_terminal_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    monkeypatch.setattr(rich, "_console", terminal)
    with pytest.raises(RuntimeError, match="The toy broke"):
        toy_trainer(tmp_path, [Progress()]).fit(ToyModule(fail_at=2), datamodule=ToyData())
    assert terminal.file.getvalue().count("\x1b[?25l") == terminal.file.getvalue().count("\x1b[?25h")


def test_a_disabled_progress_is_silent(tmp_path: Path, console: Console):
    progress = Progress(plain_seconds=0.0)
    progress.disable()
    fit(tmp_path, progress)
    progress.print("unseen")
    assert console.file.getvalue() == ""
    progress.enable()
    progress.print("[seen]")
    assert console.file.getvalue() == "[seen]\n"


def test_a_module_can_print_above_the_bars(tmp_path: Path, console: Console):
    class Talking(ToyModule):
        def on_train_start(self) -> None:
            self.print("It begins.")

    toy_trainer(tmp_path, [Progress()], max_steps=1).fit(Talking(), datamodule=ToyData())
    assert "It begins." in console.file.getvalue()
