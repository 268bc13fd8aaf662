"""The model card of an exported folder: what was trained on what, what came of it, and how to do it again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from perception_r1.commands.runs import Run
from perception_r1.policy.load import model_path
from perception_r1.task import tasks_of

_VERSIONS = ("python", "torch", "transformers", "peft", "perception_r1")


def model_card(run: Run, *, checkpoint: Path, step: int, is_adapter: bool) -> str:
    """A README.md in the hub's form: metadata between two lines of dashes, then Markdown.

    Args:
        run: The run.
        checkpoint: The file that was exported.
        step: Optimiser step at which it was written.
        is_adapter: The folder holds an adapter, not a whole model.
    """
    is_local = Path(model_path(run.policy.name)).is_dir()
    base = Path(run.policy.name).name if is_local else run.policy.name  # a path means nothing on another machine
    library, tags = "peft" if is_adapter else "transformers", ["perception-r1", "visual-perception"]
    metadata = {"library_name": library, "pipeline_tag": "image-text-to-text"}
    metadata |= {} if is_local else {"base_model": base}  # the hub knows it by its id only
    git, tasks = run.card["git"], tasks_of(run.task).values()
    names = ", ".join(task.name for task in tasks)
    kind = "LoRA adapter" if is_adapter else "model, LoRA adapter merged" if run.policy.lora else "model"
    summary = {
        "base model": base,
        "training": run.training,
        "task": names,
        **{f"options of {task.name}": json.dumps(asdict(task)) for task in tasks},
        "this folder": f"{kind}, from `{checkpoint.name}` at step {step}",
        **{f"prompt of {task.name}": f"`{task.prompt('{query}')}`" for task in tasks},
        "status of the run": run.card["status"],
        "commit": f"{git['commit']}{' with changes' if git['is_dirty'] else ''}" if git else "unknown",
        "versions": ", ".join(f"{name} {run.card['versions'].get(name)}" for name in _VERSIONS),
    }
    cells = [(name, value.replace("|", "\\|").replace("\n", " ")) for name, value in summary.items()]
    sections = [
        f"---\n{yaml.safe_dump({**metadata, 'tags': tags}, sort_keys=False)}---",
        f"# {base} on {names}",
        f"Post-trained on visual perception with perception-r1 ({run.training}).",
        _table([("fact", "value"), *cells]),
        *_metrics(run.card, step),
        "## Again",
        f"```bash\n{shlex.join(['perception-r1', *run.card['command'][1:]])}\n```",
        f"## License\n\nThe license of this model is that of its base model, {base}.",
    ]
    return "\n\n".join(sections) + "\n"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its headings first."""
    head, *lines = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def _metrics(card: Mapping[str, Any], step: int) -> list[str]:
    """Greedy metrics on the test split before and after, with a word on what "after" means."""
    before, after = card.get("before", {}), card.get("after", {})
    if not after:
        return []
    rows = [(name, _number(before.get(name)), _number(value)) for name, value in after.items()]
    note = "" if card["steps"] == step else f" This folder holds the weights of step {step}."
    said = f"Greedy answers on the run's test split, at its start and at its end.{note}"
    return ["## Metrics", said, _table([("metric", "before", f"after {card['steps']} steps"), *rows])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
