"""The model card of an exported folder: what was trained on what, what came of it, and how to use it and do it again.

A README.md in the hub's form: metadata (`card_metadata.py`) between two lines of dashes, then Markdown, of which
`card_usage.py` writes what the reader may copy.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from perception_r1.commands.card_metadata import Export, card_metadata, origins, splits_of
from perception_r1.commands.card_usage import prompt_of, usage
from perception_r1.commands.evaluations import CheckpointEvaluation
from perception_r1.commands.runs import Run
from perception_r1.commands.settings import class_defaults, deviations
from perception_r1.policy.load import PolicyConfig
from perception_r1.task import tasks_of

CONFIG = "training_config.yaml"
"""Every setting of the run, beside the card."""
_NO_SETTINGS = ("task", "tasks", "world", "train", "val", "test", "curriculum")
"""Of the data: what stands elsewhere in the card, and what names files of this machine."""
_ABOUT_MARGINS = "What stands after ± is half the width of the 95 % confidence interval over samples."


def model_card(export: Export) -> str:
    """The text of README.md."""
    run, names = export.run, ", ".join(task.name for task in tasks_of(export.run.task).values())
    license_name = export.base_card.get("license_name") or export.base_card.get("license") or "not known here"
    sections = [
        f"---\n{card_metadata(export).to_yaml()}\n---",
        f"# {export.base_name} on {names}",
        f"Post-trained on visual perception with perception-r1 ({run.training}), after"
        " [Perception-R1](https://arxiv.org/abs/2504.07954).",
        _table([("fact", "value"), *_summary(export)]),
        *usage(export),
        *_data(run),
        *_metrics(run.card, export.step),
        *_evaluations(export.evaluations),
        *_training(run),
        f"## License\n\nThe license of this model is that of its base model, {export.base_name}: {license_name}.",
    ]
    return "\n\n".join(sections) + "\n"


def _summary(export: Export) -> list[tuple[str, str]]:
    run, tasks = export.run, list(tasks_of(export.run.task).values())
    kind = "LoRA adapter" if export.is_adapter else "model, LoRA adapter merged" if run.policy.lora else "model"
    git, (low, high) = run.card["git"], export.processor.pixel_bounds
    summary = {
        "base model": export.base_name,
        "training": run.training,
        "task": ", ".join(task.name for task in tasks),
        **{f"options of {task.name}": json.dumps(asdict(task)) for task in tasks},
        **{f"prompt of {task.name}": f"`{prompt_of(task, '{query}')}`" for task in tasks},
        "boxes in answers": export.codec.description,
        "pictures": f"resized to {low:,} to {high:,} pixels",
        "longest answer": f"{run.max_new_tokens} tokens",
        "this folder": f"{kind}, from `{export.checkpoint.name}` at step {export.step}",
        "status of the run": run.card["status"],
        "commit": f"{git['commit']}{' with changes' if git['is_dirty'] else ''}" if git else "unknown",
        "versions": ", ".join(f"{name} {version}" for name, version in run.card["versions"].items()),
    }
    return list(summary.items())


def _data(run: Run) -> list[str]:
    """Number and origins of the samples of each split."""
    rows = [("split", "samples", "from")]
    for name, split in splits_of(run).items():
        told = ", ".join(origin.name for origin in origins(split)) + ", held out" * split["is_held_out"]
        rows.append((name, f"{split['num_samples']:,}", told))
    return ["## Data", _table(rows), f"Fingerprint: `{run.card['data']['fingerprint']}`"] if len(rows) > 1 else []


def _metrics(card: Mapping[str, Any], step: int) -> list[str]:
    """Greedy metrics on the test split before and after, with a word on what "after" means."""
    before, after = card.get("before", {}), card.get("after", {})
    if not after:
        return []
    margins = {when: card["margins_of_error"].get(when, {}) for when in ("before", "after")}
    rows = [
        (name, _number(before.get(name), margins["before"].get(name)), _number(value, margins["after"].get(name)))
        for name, value in after.items()
    ]
    note = "" if card["steps"] == step else f" This folder holds the weights of step {step}."
    said = f"Greedy answers on the run's test split, at its start and at its end.{note} {_ABOUT_MARGINS}"
    return ["## Metrics", said, _table([("metric", "before", f"after {card['steps']} steps"), *rows])]


def _evaluations(evaluations: Sequence[CheckpointEvaluation]) -> list[str]:
    """Metrics of exactly these weights."""
    rows = [
        (found.split, source, f"{found.num_samples[source]:,}", name, _number(value, found.margins[source].get(name)))
        for found in evaluations
        for source, values in found.metrics.items()
        for name, value in values.items()
    ]
    if not rows:
        return []
    table = _table([("split", "source", "samples", "metric", "value"), *rows])
    return ["## Evaluations of these weights", _ABOUT_MARGINS, table]


def _training(run: Run) -> list[str]:
    """Settings that differ from the defaults, and the command."""
    model, data = run.config["model"], run.config["data"]
    defaults = class_defaults(model["class_path"]) | {"policy": PolicyConfig(name=run.policy.name)}
    named = {name: value for name, value in data["init_args"].items() if not name.endswith("_file")}
    own = {name: value for name, value in named.items() if name not in _NO_SETTINGS}
    settings = {
        **dict(deviations(model["init_args"], defaults, "model.")),
        **dict(deviations(own, class_defaults(data["class_path"]), "data.")),
        "seed": run.card["seeds"]["everything"],
        **{f"trainer.{name}": value for name, value in run.card["trainer"].items()},
    }
    return [
        "## Training",
        f"What differs from the defaults; [{CONFIG}]({CONFIG}) has every setting.",
        _table([("setting", "value"), *((name, json.dumps(value)) for name, value in settings.items())]),
        f"```bash\n{shlex.join(['perception-r1', *run.card['command'][1:]])}\n```",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its headings first."""
    plain = [[cell.replace("|", "\\|").replace("\n", " ") for cell in cells] for cells in rows]
    head, *lines = (f"| {' | '.join(cells)} |" for cells in plain)
    return "\n".join([head, "|---" * len(rows[0]) + "|", *lines])


def _number(value: float | None, margin: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" + ("" if margin is None else f" ± {margin:.4f}")
