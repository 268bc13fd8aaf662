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
_HEADINGS = ("data", "metric", "here", "paper: before", "paper: Perception-R1")


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
    lines += [f"| {' | '.join(cells)} |" for cells in (_HEADINGS, ["---"] * len(_HEADINGS), *rows)] + [""]
    for title, chosen in (("worst", ranked[:num_samples]), ("best", ranked[::-1][:num_samples])):
        if chosen:
            cards = [sample_card(task, scored_completion(index), step=None) for index in chosen]
            contact_sheet(cards).save(folder / f"{title}.png")
            lines += [f"## {title.capitalize()} answers", "", f"![{title} answers]({title}.png)", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    console = get_console()
    console.print(_table(rows, task.primary_metric))
    console.print(Text.assemble(("report       ", "bold"), str(folder / "report.md")), soft_wrap=True)


def _rows(metrics: Metrics, primary_metric: str) -> list[list[str]]:
    """The cells of the table: the primary metric of each source first, then what the paper has."""
    rows = []
    for source, values in metrics.items():
        paper = PUBLISHED.get(source, {})
        for name in sorted(values, key=lambda name: (name != primary_metric, name not in paper)):
            published = map(_shown, paper[name]) if name in paper else ("", "")
            rows.append([source, name, _shown(values[name]), *published])
    return rows


def _table(rows: Sequence[Sequence[str]], primary_metric: str) -> Table:
    table = Table(title="Greedy answers", title_justify="left")
    for index, heading in enumerate(_HEADINGS):
        table.add_column(heading, justify="left" if index < 2 else "right")
    for cells in rows:
        table.add_row(*map(Text, cells), style="bold" if cells[1] == primary_metric else "")
    return table


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"
