"""Where the time of each run went: stacked bars, and the same in numbers."""

from collections.abc import Collection, Mapping, Sequence

from perception_r1.reporting.curves import Curve
from perception_r1.reporting.folder import Record
from perception_r1.reporting.html import Markup, element, join, table
from perception_r1.reporting.parts import NOTHING, chip, duration, note, scrolling, section
from perception_r1.reporting.values import is_number, numbers

_ROLLOUT = ("data", "encode", "vision", "weights", "prefill", "decode", "reward", "reference")
_PHASES = (*_ROLLOUT, "policy_forward", "backward", "optimizer", "validation")
"""In the order of a step."""
_REST = "elsewhere"
"""What belongs to no phase."""


def time_section(records: Sequence[Record], names: Sequence[str], curves: Sequence[Mapping[str, Curve]]) -> Markup:
    """Where the time went: a stacked bar for each run, and the same in numbers."""
    seconds = [_phase_seconds(record, each) for record, each in zip(records, curves, strict=True)]
    longest = max((sum(each.values()) for each in seconds), default=0.0)
    if longest <= 0:
        return section("time", "Time", note("Nothing is known of the phases yet."))
    bars = []
    for index, (name, each) in enumerate(zip(names, seconds, strict=True)):
        if each:
            told = ", ".join(f"{phase} {value / sum(each.values()):.0%}" for phase, value in each.items())
            label = element("span", chip(index, name), " ", duration(sum(each.values())), class_="bar-label")
            bars += [label, _bar(each, longest, f"{name}: {told}")]
    phases = _in_order({phase for each in seconds for phase in each})
    shown = [index for index, each in enumerate(seconds) if each]
    rows = [
        [join([element("span", "", class_=f"swatch {_phase_class(phase)}"), phase.replace("_", " ")])]
        + [_share(seconds[index].get(phase), sum(seconds[index].values())) for index in shown]
        for phase in phases
    ]
    numbers_table = table(["phase", *(names[index] for index in shown)], rows, class_="numbers")
    about = [note("Elsewhere: the start, the evaluations before and after, checkpoints.")] if _REST in phases else []
    return section("time", "Time", element("div", *bars, class_="bars"), scrolling(numbers_table), *about)


def _phase_seconds(record: Record, curves: Mapping[str, Curve]) -> dict[str, float]:
    """Seconds of each phase, from the card; of a run that goes on, from what it has logged."""
    found = {name: value for name, value in numbers(record.card.get("phase_seconds")).items() if value > 0}
    if not found:
        tag = "train/seconds/"
        logged = {name.removeprefix(tag): curve for name, curve in curves.items() if name.startswith(tag)}
        found = {name: _total(curve) for name, curve in logged.items() if name != "step"}
        found |= {"validation": _total(curves["val/seconds"])} if "val/seconds" in curves else {}
    elif is_number(record.card.get("seconds")):  # of one that goes on from another run they are fewer
        rest = record.card["seconds"] - sum(found.values())
        found |= {_REST: rest} if rest > 0 else {}
    return {name: found[name] for name in _in_order(found)}


def _in_order(phases: Collection[str]) -> list[str]:
    """Phases as a step has them, those that are not known here behind them, and the rest at the end."""
    order = dict.fromkeys((*_PHASES, *sorted(set(phases) - {_REST}), _REST))
    return [phase for phase in order if phase in phases]


def _total(curve: Curve) -> float:
    return sum(value for value in curve.values if value is not None) * curve.num_steps


def _bar(seconds: Mapping[str, float], longest: float, label: str) -> Markup:
    parts, left = [], 0.0
    for phase, value in seconds.items():
        width = 1000 * value / longest
        title = element("title", f"{phase.replace('_', ' ')}: {duration(value)}")
        parts.append(
            element("rect", title, x=round(left, 2), y=0, width=round(width, 2), height=28, class_=_phase_class(phase))
        )
        left += width
    box = {"viewBox": "0 0 1000 28", "preserveAspectRatio": "none"}
    return element("svg", *parts, **box, class_="bar", role="img", aria_label=label)


def _phase_class(phase: str) -> str:
    return f"p-{phase}" if phase in (*_PHASES, _REST) else "p-other"


def _share(seconds: float | None, total: float) -> str:
    if seconds is None:
        return NOTHING
    return join([duration(seconds), element("small", f" {seconds / total:.1%}")])
