"""The first section of a report: what each run was, and how it ended."""

from collections.abc import Sequence

from perception_r1.reporting.folder import Record
from perception_r1.reporting.html import Markup, element
from perception_r1.reporting.parts import chip, duration
from perception_r1.reporting.values import is_number


def runs_section(records: Sequence[Record], names: Sequence[str]) -> Markup:
    """What each run was, and how it ended."""
    cards = [_run_card(index, record, name) for index, (record, name) in enumerate(zip(records, names, strict=True))]
    return element("section", *cards, id="runs", aria_label="Runs")


def _run_card(index: int, record: Record, name: str) -> Markup:
    card = record.card
    lines = [
        f"{record.training} · {', '.join(dict.fromkeys(record.task_names.values())) or 'unknown task'}",
        f"model {record.model}",
    ]
    done = []
    if is_number(card.get("steps")):
        done.append(f"{card['steps']:,} steps")
    if is_number(card.get("seconds")):
        done.append(duration(card["seconds"]))
    when = card.get("end" if record.is_evaluation else "start")
    if isinstance(when, str):
        done.append(when.replace("T", " ").removesuffix("+00:00")[:16] + " UTC")
    lines += [" · ".join(done)] if done else []
    status = record.status
    kind = "good" if status == "finished" else "bad" if status.startswith("failed") else "open"
    told = "running, or killed: it has not told its end" if status == "running" else status
    told_lines = [*(element("p", line) for line in lines), element("p", told, class_=f"status {kind}")]
    return element("article", element("h2", chip(index, name)), *told_lines, class_="run")
