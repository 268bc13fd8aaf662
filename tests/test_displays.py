"""Plain lines and bars, with a clock that the test turns."""

import io

from rich.console import Console

from perception_r1.displays import Bars, Lines, open_display


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain() -> Console:
    return Console(file=io.StringIO(), width=60, force_terminal=False)


def written(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()  # type: ignore[attr-defined]


def test_a_line_comes_at_each_tenth_with_times_and_metrics():
    console, clock = plain(), Clock()
    lines = Lines(console, 60.0, clock)
    lines.start("training", 0, 50)
    for done in range(1, 51):
        clock.now += 2.0
        lines.advance("training", done, {"reward": 0.12345678, "kl": 1e-7})
    assert len(written(console)) == 10
    assert written(console)[0] == "training 5/50 (10%), 0:00:10 gone, 0:01:30 left, reward 0.1235, kl 1e-07"
    assert written(console)[-1].startswith("training 50/50 (100%), 0:01:40 gone, 0:00:00 left")


def test_slow_steps_get_a_line_each_and_fast_ones_only_the_last():
    console, clock = plain(), Clock()
    lines = Lines(console, 20.0, clock)
    lines.start("slow", 0, 1_000)
    for done in range(1, 4):
        clock.now += 30.0
        lines.advance("slow", done, {})
    assert len(written(console)) == 3
    lines.start("fast", 0, 100)
    for done in range(1, 101):
        clock.now += 0.001
        lines.advance("fast", done, {})
    assert written(console)[3:] == ["fast 100/100 (100%), 0:00:00 gone, 0:00:00 left"]


def test_time_left_counts_from_where_a_run_was_taken_up():
    console, clock = plain(), Clock()
    lines = Lines(console, 20.0, clock)
    lines.start("training", 50, 100)
    clock.now = 100.0
    lines.advance("training", 60, {})
    assert "60/100 (60%), 0:01:40 gone, 0:06:40 left" in written(console)[0]


def test_work_without_end_has_no_share_and_no_time_left():
    console, clock = plain(), Clock()
    lines = Lines(console, 20.0, clock)
    lines.start("training", 0, None)
    clock.now = 25.0
    lines.advance("training", 7, {})
    assert written(console) == ["training 7, 0:00:25 gone"]


def test_plain_output_has_no_control_sequences_and_a_terminal_gets_bars():
    assert isinstance(open_display(plain(), 20.0), Lines)
    terminal = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100)
    display = open_display(terminal, 20.0)
    display.close()
    assert isinstance(display, Bars)


def test_bars_show_steps_metrics_and_several_works():
    console = Console(file=io.StringIO(), force_terminal=True, force_interactive=True, width=100, color_system=None)
    bars = Bars(console)
    bars.start("training", 3, 10)
    bars.advance("training", 4, {"reward": 0.5})
    bars.start("validation", 0, None)
    bars.advance("validation", 2, {})
    bars._progress.refresh()
    bars.finish("validation")
    bars.finish("validation")
    bars.close()
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4/10" in text
    assert "reward 0.5" in text
    assert "validation" in text
    last_frame = text[text.rfind("training") :]
    assert "validation" not in last_frame
