"""The model card of an exported folder: what was trained on what, what came of it, and how to do it again."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from perception_r1.commands.runs import Run

_VERSIONS = ("python", "torch", "transformers", "peft", "perception_r1")


def model_card(run: Run, *, checkpoint: Path, step: int, is_adapter: bool) -> str:
    """A README.md in the hub's form: metadata between two lines of dashes, then Markdown.

    Args:
        run: The run.
        checkpoint: The file that was exported.
        step: Optimiser step at which it was written.
        is_adapter: The folder holds an adapter, not a whole model.
    """
    base = _base_name(run.policy.name)
    kind = "LoRA adapter" if is_adapter else "model, LoRA adapter merged" if run.policy.lora else "model"
    summary = {
        "base model": base,
        "training": run.training,
        "task": run.task.name,
        "options of the task": json.dumps(run.card["task"]["init_args"]),
        "this folder": f"{kind}, from `{checkpoint.name}` at step {step}",
        "prompt": f"`{run.task.prompt('{query}')}`",
        "status of the run": run.card["status"],
        "commit": _commit(run.card["git"]),
        "versions": ", ".join(f"{name} {run.card['versions'].get(name)}" for name in _VERSIONS),
    }
    rows = [f"| {name} | {_cell(value)} |" for name, value in summary.items()]
    sections = [
        _metadata(base, Path(run.policy.name).is_dir(), is_adapter=is_adapter),
        f"# {base} on {run.task.name}",
        f"Post-trained on visual perception with perception-r1 ({run.training}).",
        "\n".join(["| fact | value |", "|---|---|", *rows]),
        *_metrics(run.card, step),
        "## Again",
        f"```bash\n{_command(run.card['command'])}\n```",
        f"## License\n\nThe license of this model is that of its base model, {base}.",
    ]
    return "\n\n".join(sections) + "\n"


def _base_name(name: str) -> str:
    """A hub id as it is; of a folder its name alone, for a path means nothing on another machine."""
    return Path(name).name if Path(name).is_dir() else name


def _metadata(base: str, is_local: bool, *, is_adapter: bool) -> str:
    """What the hub reads; it knows a base model by its id only."""
    lines = ["---", f"library_name: {'peft' if is_adapter else 'transformers'}", "pipeline_tag: image-text-to-text"]
    lines += [] if is_local else [f"base_model: {base}"]
    return "\n".join([*lines, "tags:", "- perception-r1", "- visual-perception", "---"])


def _metrics(card: Mapping[str, Any], step: int) -> list[str]:
    """Greedy metrics on the test split before and after, with a word on what "after" means."""
    before, after = card.get("before", {}), card.get("after", {})
    if not after:
        return []
    rows = [f"| {name} | {_number(before.get(name))} | {_number(value)} |" for name, value in after.items()]
    head = [f"| metric | before | after {card['steps']} steps |", "|---|---|---|"]
    note = "" if card["steps"] == step else f" This folder holds the weights of step {step}."
    said = f"Greedy answers on the run's test split, at its start and at its end.{note}"
    return ["## Metrics", said, "\n".join([*head, *rows])]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _cell(text: str) -> str:
    """Text that no cell of a table breaks on."""
    return text.replace("|", "\\|").replace("\n", " ")


def _commit(git: Mapping[str, object] | None) -> str:
    if git is None:
        return "unknown"
    return f"{git['commit']}{' with changes' if git['is_dirty'] else ''}"


def _command(command: Sequence[str]) -> str:
    """The command line of the run, the program by its name alone."""
    return shlex.join(["perception-r1", *command[1:]])
