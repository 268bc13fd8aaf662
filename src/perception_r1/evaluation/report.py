"""The report of an evaluation: its figures beside published ones, and the worst and best pictures."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import get_console
from rich.table import Table
from rich.text import Text

from perception_r1.callbacks.pictures import outcome_card
from perception_r1.data.loading import with_picture
from perception_r1.data.scenes import Split
from perception_r1.drawing import contact_sheet
from perception_r1.evaluation.paper import PAPER
from perception_r1.scoring import Outcome
from perception_r1.task import Task

Figures = Mapping[str, Mapping[str, float]]
"""Source -> figure -> value."""
_Row = tuple[str, str, float, tuple[float, float] | None]
"""Source, figure, value, and what the paper has."""


def write_report(
    folder: Path,
    task: Task[Any, Any],
    figures: Figures,
    *,
    split: Split,
    outcomes: Sequence[Outcome],
    rewards: Sequence[float],
    num_pictures: int,
    checkpoint: str | None,
) -> None:
    """Write `report.md` with its pictures, and show the table.

    Args:
        folder: Where they go.
        task: The task.
        figures: Of every source.
        split: What was evaluated.
        outcomes: Of every sample, pictures not loaded.
        rewards: Of every sample.
        num_pictures: How many of the worst and of the best are drawn.
        checkpoint: What was evaluated; None: the model before training.
    """
    ranked = sorted(range(len(rewards)), key=rewards.__getitem__)
    lines = [f"# Evaluation of {task.name}", "", f"Checkpoint: {checkpoint or 'none, the model as it is'}. "]
    lines += [f"{len(rewards)} samples of the {split} split, greedy decoding.", ""]
    rows = _rows(figures, task.headline)
    lines += [*_markdown(rows), ""]
    for title, places in (("worst", ranked[:num_pictures]), ("best", ranked[::-1][:num_pictures])):
        if places:
            cards = [outcome_card(task, _loaded(outcomes[place]), step=None) for place in places]
            contact_sheet(cards).save(folder / f"{title}.png")
            lines += [f"## {title.capitalize()} answers", "", f"![{title} answers]({title}.png)", ""]
    (folder / "report.md").write_text("\n".join(lines), encoding="utf-8")
    console = get_console()
    console.print(_table(rows, task.headline))
    console.print(Text.assemble(("report       ", "bold"), str(folder / "report.md")), soft_wrap=True)


def _rows(figures: Figures, headline: str) -> list[_Row]:
    """The headline of each source first, then what the paper has."""
    rows: list[_Row] = []
    for source, values in figures.items():
        paper = PAPER.get(source, {})
        names = sorted(values, key=lambda name, paper=paper: (name != headline, name not in paper))  # type: ignore[misc]
        rows += [(source, name, values[name], paper.get(name)) for name in names]
    return rows


def _markdown(rows: Sequence[_Row]) -> list[str]:
    lines = ["| data | figure | here | paper: before | paper: Perception-R1 |", "|---|---|---|---|---|"]
    for source, name, value, paper in rows:
        lines.append(f"| {' | '.join([source, name, _shown(value), *_both(paper)])} |")
    return lines


def _table(rows: Sequence[_Row], headline: str) -> Table:
    table = Table(title="Greedy answers", title_justify="left")
    for heading in ("data", "figure"):
        table.add_column(heading)
    for heading in ("here", "paper: before", "paper: Perception-R1"):
        table.add_column(heading, justify="right")
    for source, name, value, paper in rows:
        cells = [source, name, _shown(value), *_both(paper)]
        table.add_row(*map(Text, cells), style="bold" if name == headline else "")
    return table


def _both(paper: tuple[float, float] | None) -> list[str]:
    return [_shown(number) for number in paper] if paper else ["", ""]


def _shown(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.4f}"


def _loaded(outcome: Outcome) -> Outcome:
    return replace(outcome, sample=with_picture(outcome.sample))
