"""The report of an evaluation: metrics, beside the paper's where both were computed alike, worst and best pictures."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text

from perception_r1.callbacks.log_samples import sample_card
from perception_r1.drawing import contact_sheet
from perception_r1.evaluation.paper import Comparison, reported_of
from perception_r1.metrics import PUBLISHED
from perception_r1.records import Split
from perception_r1.scoring import ScoredCompletion
from perception_r1.task import Task

Metrics = Mapping[str, Mapping[str, float]]
"""Source -> metric -> value."""
_HEADINGS = ("data", "metric", "strict", "as published", "paper: before", "paper: Perception-R1")


@dataclass(frozen=True, kw_only=True)
class TaskResults:
    """What was found of one task.

    Attributes:
        task: The task.
        metrics: Of each of its sources.
        margins: Half the width of the 95 % confidence interval of each.
        comparison: What of it may stand beside the paper's metrics.
    """

    task: Task[Any, Any]
    metrics: Metrics
    margins: Metrics
    comparison: Comparison


def write_report(
    folder: Path,
    results: Sequence[TaskResults],
    *,
    split: Split,
    scored_completion: Callable[[int], tuple[Task[Any, Any], ScoredCompletion]],
    rewards: Sequence[float],
    num_samples: int,
    checkpoint: str | None,
) -> None:
    """Write `report.md` with its pictures, and show the table.

    Args:
        folder: Where they go.
        results: What was found of each task.
        split: What was evaluated.
        scored_completion: That of the sample with an index, its picture not loaded, and its task.
        rewards: Of every sample.
        num_samples: How many of the worst and of the best are drawn.
        checkpoint: What was evaluated; None: the model before training.
    """
    ranked = sorted(range(len(rewards)), key=rewards.__getitem__)
    names = ", ".join(part.task.name for part in results)
    lines = [f"# Evaluation of {names}", "", f"Checkpoint: {checkpoint or 'none, the model as it is'}. "]
    lines += [f"{len(rewards)} samples of the {split} split, greedy decoding.", ""]
    lines += ["What stands after ± is half the width of the 95 % confidence interval over samples.", ""]
    rows = [row for part in results for row in _rows(part)]
    told = dict.fromkeys(sentence for part in results for sentence in sentences(part))
    lines += [f"| {' | '.join(cells)} |" for cells in (_HEADINGS, ["---"] * len(_HEADINGS), *rows)] + [""]
    lines += [line for sentence in told for line in (sentence, "")]
    for title, chosen in (("worst", ranked[:num_samples]), ("best", ranked[::-1][:num_samples])):
        if chosen:
            cards = [sample_card(*scored_completion(index), step=None) for index in chosen]
            contact_sheet(cards).save(folder / f"{title}.png")
            lines += [f"## {title.capitalize()} answers", "", f"![{title} answers]({title}.png)", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    console = get_console()
    primary = {(source, part.task.primary_metric) for part in results for source in part.metrics}
    console.print(_table(rows, primary))
    console.print(Text.assemble(("report       ", "bold"), str(folder / "report.md")), soft_wrap=True)


def sentences(part: TaskResults) -> list[str]:
    """What the table shows, in words: how answers were read, and what keeps the paper's metrics out."""
    task, metrics, comparison = part.task, part.metrics, part.comparison
    if not task.published_metric_names:
        return []
    found = [
        "Both columns read the same answers: strictly, where a wrong format counts as wrong, or as the public "
        "evaluation code of Perception-R1 does."
    ]
    name = task.primary_metric if task.primary_metric in task.published_metric_names else task.published_metric_names[0]
    for source, values in metrics.items():
        strict, published = values.get(name, math.nan), values.get(PUBLISHED + name, math.nan)
        if not math.isnan(published - strict):
            told = f"{_shown(published)} instead of {_shown(strict)} ({published - strict:+.4f})"
            found.append(f"Read as published, {name} of {source} is {told if published != strict else 'the same'}.")
    reported = [source for source in metrics if reported_of(source) is not None]
    if reported and comparison.deviations:
        clauses = "; ".join(comparison.deviations)
        found.append(
            f"No metric of the paper stands beside these, since its answers were generated in another way: {clauses}. "
            "`--protocol published` generates them alike."
        )
    for source in reported:
        if source in comparison.incomplete:
            here, there = comparison.incomplete[source]
            found.append(f"The paper's metrics of {source} are of {there} samples, and these of {here}.")
    return found


def _rows(part: TaskResults) -> list[list[str]]:
    """The cells of the table: the primary metric of each source first, then what the paper has."""
    rows, primary_metric = [], part.task.primary_metric
    for source, values in part.metrics.items():
        found = reported_of(source)
        reported = {} if found is None else found.values
        names = [name for name in values if not name.startswith(PUBLISHED)]
        for name in sorted(names, key=lambda name: (name != primary_metric, name not in reported)):
            published = _shown(values[PUBLISHED + name]) if PUBLISHED + name in values else ""
            paper = part.comparison.paper_metrics(source, name)
            cells = map(_shown, paper) if paper else ("", "")
            margin = part.margins.get(source, {}).get(name, math.nan)
            rows.append([source, name, _shown(values[name]) + _margin(margin), published, *cells])
    return rows


def _table(rows: Sequence[Sequence[str]], primary: Collection[tuple[str, str]]) -> Table:
    table = Table(title="Greedy answers", title_justify="left")
    filled = [index for index in range(len(_HEADINGS)) if any(cells[index] for cells in rows)]
    for index in filled:
        table.add_column(_HEADINGS[index], justify="left" if index < 2 else "right")
    for cells in rows:
        style = "bold" if (cells[0], cells[1]) in primary else ""
        table.add_row(*(Text(cells[index]) for index in filled), style=style)
    return table


def _margin(value: float) -> str:
    return "" if math.isnan(value) else f" ± {value:.4f}"


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
