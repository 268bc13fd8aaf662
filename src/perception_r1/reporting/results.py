"""The results of a report: metrics before and after with their intervals, and their differences."""

import re
from collections.abc import Mapping, Sequence

from perception_r1.reporting.comparison import Difference, compare_metrics
from perception_r1.reporting.folder import TIMES, Metric, Record
from perception_r1.reporting.html import Markup, element, join
from perception_r1.reporting.parts import MINUS, NOTHING, chip, note, scrolling, section

_PLOT_WIDTH, _PLOT_ROW = 200, 32
"""Of the plot of a metric, in its own units."""
_ABOUT = (
    "Greedy answers to the test split. What stands after ± is half the width of the 95 % confidence interval; that of "
    "a difference follows from the same samples in pairs, where a metric is a mean over samples. A difference is bold "
    "where its interval leaves zero out. In the plots a ring is before, and a dot is after."
)


def results_section(records: Sequence[Record], names: Sequence[str]) -> Markup:
    """Metrics before and after with their intervals, and their differences."""
    metrics = _metrics(records)
    if not metrics:
        return section("results", "Before and after", note("No metrics on the test split yet: a run ends with them."))
    head = ["metric", "run", "", "before", "after", "change", f"beside {names[0]}"]
    kept = _kept_columns(records)
    changes = [compare_metrics((record, "before"), (record, "after")) for record in records]
    beside = [compare_metrics((records[0], "after"), (record, "after")) for record in records]
    rows = []
    for metric in metrics:
        shown = [index for index, record in enumerate(records) if metric in _known(record)]
        for index in shown:
            cells = [
                _name_cell(metric, metrics, records, len(shown)) if index == shown[0] else Markup(),
                element("td", chip(index, names[index])),
                element("td", _plot(records, shown, metric), rowspan=len(shown), class_="plot")
                if index == shown[0]
                else Markup(),
                *(_measured(records[index], when, metric) for when in TIMES),
                _difference(changes[index].get(metric)),
                _difference(beside[index].get(metric) if index else None),
            ]
            rows.append(element("tr", *(cell for cell, is_kept in zip(cells, kept, strict=True) if is_kept)))
    classes = [*[None] * 3, *["number"] * 4]
    headings = [
        element("th", text, scope="col", class_=kind)
        for text, kind, is_kept in zip(head, classes, kept, strict=True)
        if is_kept
    ]
    table = element("table", element("thead", element("tr", *headings)), element("tbody", *rows), class_="results")
    return section("results", "Before and after", scrolling(table), note(_ABOUT))


def _kept_columns(records: Sequence[Record]) -> list[bool]:
    """Which columns have anything to say."""
    several, is_trained = len(records) > 1, any(record.metrics("before") for record in records)
    return [True, several, True, is_trained, True, is_trained, several]


def _name_cell(metric: Metric, metrics: Sequence[Metric], records: Sequence[Record], num_rows: int) -> Markup:
    is_primary = any(metric in record.primary_metrics for record in records)
    several = len({each.task for each in metrics}) > 1
    name = (
        join([element("small", metric.task), element("br"), _breaking(metric.name)])
        if several
        else _breaking(metric.name)
    )
    return element("th", name, scope="rowgroup", rowspan=num_rows, class_="primary" if is_primary else None)


def _metrics(records: Sequence[Record]) -> list[Metric]:
    """All metrics that are known: task by task, the primary one first, then rewards and the others as they come."""
    found = dict.fromkeys(metric for record in records for metric in _known(record))
    primary = {metric for record in records for metric in record.primary_metrics}
    tasks = list(dict.fromkeys(metric.task for metric in found))
    return sorted(found, key=lambda metric: (tasks.index(metric.task), metric not in primary))


def _known(record: Record) -> Mapping[Metric, float]:
    return {**record.metrics("after"), **record.metrics("before")}


def _breaking(name: str) -> Markup:
    """A name that may go on in the next line behind its slashes and underscores."""
    return Markup(re.sub("([/_])", r"\1<wbr>", join([name])))


def _measured(record: Record, when: str, metric: Metric) -> Markup:
    value, margin = record.metrics(when).get(metric), record.margins(when).get(metric)
    return element("td", NOTHING if value is None else join([_shown(value), _margin(margin)]), class_="number")


def _difference(difference: Difference | None) -> Markup:
    if difference is None:
        return element("td", NOTHING, class_="number")
    told = join([f"{difference.value:+.3f}".replace("-", MINUS), _margin(difference.margin)])
    return element("td", element("strong", told) if difference.is_clear else told, class_="number")


def _margin(margin: float | None) -> str:
    return "" if margin is None else element("small", f" ± {margin:.3f}")


def _shown(value: float) -> str:
    return (f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}").replace("-", MINUS)


def _plot(records: Sequence[Record], shown: Sequence[int], metric: Metric) -> Markup:
    """Values with their intervals on one scale: a ring before, a dot after."""
    points = {
        (index, when): (values[metric], records[index].margins(when).get(metric, 0.0))
        for index in shown
        for when in TIMES
        if metric in (values := records[index].metrics(when))
    }
    low = min(value - margin for value, margin in points.values())
    high = max(value + margin for value, margin in points.values())
    room = (high - low) or 1.0

    def x(value: float) -> float:
        return round(8 + (value - low) / room * (_PLOT_WIDTH - 16), 1)

    marks = []
    for (index, when), (value, margin) in points.items():
        y = _PLOT_ROW * (shown.index(index) + (0.35 if when == "before" else 0.65))
        marks.append(
            element("line", x1=x(value - margin), x2=x(value + margin), y1=y, y2=y, class_=f"whisker r{index}")
        )
        marks.append(element("circle", cx=x(value), cy=y, r=4, class_=f"{when} r{index}"))
    height = _PLOT_ROW * len(shown)
    return element(
        "svg", *marks, viewBox=f"0 0 {_PLOT_WIDTH} {height}", width=_PLOT_WIDTH, height=height, aria_hidden="true"
    )
