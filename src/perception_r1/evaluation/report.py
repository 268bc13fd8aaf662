"""The report of an evaluation: its metrics beside published ones, and the worst and best pictures."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text

from perception_r1.callbacks.log_samples import sample_card
from perception_r1.drawing import contact_sheet
from perception_r1.evaluation.published import PUBLISHED
from perception_r1.records import Split
from perception_r1.scoring import ScoredCompletion
from perception_r1.task import Task

Metrics = Mapping[str, Mapping[str, float]]
"""Source -> metric -> value."""
_Row = tuple[str, str, float, tuple[float, float] | None]
"""Source, metric, value, and what the paper has."""


def write_report(
    folder: Path,
    task: Task[Any, Any],
    metrics: Metrics,
    *,
    split: Split,
    scored_completion: Callable[[int], ScoredCompletion],
    rewards: Sequence[float],
    num_samples: int,
    checkpoint: str | None,
) -> None:
    """Write `report.md` with its pictures, and show the table.

    Args:
        folder: Where they go.
        task: The task.
        metrics: Of every source.
        split: What was evaluated.
        scored_completion: That of the sample with an index, its picture not loaded.
        rewards: Of every sample.
        num_samples: How many of the worst and of the best are drawn.
        checkpoint: What was evaluated; None: the model before training.
    """
    ranked = sorted(range(len(rewards)), key=rewards.__getitem__)
    lines = [f"# Evaluation of {task.name}", "", f"Checkpoint: {checkpoint or 'none, the model as it is'}. "]
    lines += [f"{len(rewards)} samples of the {split} split, greedy decoding.", ""]
    rows = _rows(metrics, task.primary_metric)
    lines += [*_markdown(rows), ""]
    for title, chosen in (("worst", ranked[:num_samples]), ("best", ranked[::-1][:num_samples])):
        if chosen:
            cards = [sample_card(task, scored_completion(index), step=None) for index in chosen]
            contact_sheet(cards).save(folder / f"{title}.png")
            lines += [f"## {title.capitalize()} answers", "", f"![{title} answers]({title}.png)", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    console = get_console()
    console.print(_table(rows, task.primary_metric))
    console.print(Text.assemble(("report       ", "bold"), str(folder / "report.md")), soft_wrap=True)


def _rows(metrics: Metrics, primary_metric: str) -> list[_Row]:
    """The primary metric of each source first, then what the paper has."""
    rows: list[_Row] = []
    for source, values in metrics.items():
        paper = PUBLISHED.get(source, {})
        names = sorted(values, key=lambda name, paper=paper: (name != primary_metric, name not in paper))  # type: ignore[misc]
        rows += [(source, name, values[name], paper.get(name)) for name in names]
    return rows


def _markdown(rows: Sequence[_Row]) -> list[str]:
    lines = ["| data | metric | here | paper: before | paper: Perception-R1 |", "|---|---|---|---|---|"]
    for source, name, value, paper in rows:
        lines.append(f"| {' | '.join([source, name, _shown(value), *_both(paper)])} |")
    return lines


def _table(rows: Sequence[_Row], primary_metric: str) -> Table:
    table = Table(title="Greedy answers", title_justify="left")
    for heading in ("data", "metric"):
        table.add_column(heading)
    for heading in ("here", "paper: before", "paper: Perception-R1"):
        table.add_column(heading, justify="right")
    for source, name, value, paper in rows:
        cells = [source, name, _shown(value), *_both(paper)]
        table.add_row(*map(Text, cells), style="bold" if name == primary_metric else "")
    return table


def _both(paper: tuple[float, float] | None) -> list[str]:
    return [_shown(number) for number in paper] if paper else ["", ""]


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
