"""A run's folder, opened without trainer, logger or data: its task, its model, its checkpoints and its card."""

import argparse
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse
import yaml

from perception_r1.callbacks.checkpoints import FOLDER, PREVIOUS, find_last
from perception_r1.callbacks.files import CONFIG, RUN_CARD
from perception_r1.commands.options import plain
from perception_r1.engines import GenerationEngine
from perception_r1.errors import UserError
from perception_r1.policy.checkpoint import is_checkpoint, restore
from perception_r1.policy.load import PolicyConfig
from perception_r1.policy.policy import Policy
from perception_r1.task import AnyTask, Mixture, Task

CHECKPOINTS = ("best", "last")
"""Names of the checkpoints that a run keeps."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What a run's folder says.

    Attributes:
        folder: `logs/TASK/version_N`.
        training: Name of the class that trained it, `GRPO` or `SFT`.
        task: The task or tasks as they were trained, with the categories that came from the data.
        policy: The model that was trained and what of it.
        max_new_tokens: Longest completion, end token included.
        precision: That of its trainer.
        config: `config.yaml`: every setting.
        card: `run.json`, see `callbacks/run_card.py`.
    """

    folder: Path
    training: str
    task: AnyTask
    policy: PolicyConfig
    max_new_tokens: int
    precision: str
    config: Mapping[str, Any]
    card: Mapping[str, Any]


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / RUN_CARD).is_file()


def open_run(folder: Path) -> Run:
    """Read what a run's folder says; no weights are read yet.

    Raises:
        UserError: The folder is not that of a run, or its files are damaged.
    """
    if not is_run(folder):
        raise UserError(f"there is no run in {folder}: give a folder with run.json, such as logs/counting/version_0")
    try:
        card = json.loads((folder / RUN_CARD).read_text(encoding="utf-8"))
        config = yaml.safe_load((folder / CONFIG).read_text(encoding="utf-8"))
        training, settings = config["model"]["class_path"].rpartition(".")[2], config["model"]["init_args"]
        precision = config["trainer"]["precision"]
        tasks = card["tasks"] if "tasks" in card else {"": card["task"]}
        values = {"tasks": tasks, "policy": settings["policy"], "max_new_tokens": settings["max_new_tokens"]}
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"{RUN_CARD} or {CONFIG} of {folder} does not tell what was trained ({reason})") from error
    precision = "32-true" if precision is None else str(precision)
    found = _instantiated(values, folder)
    made = found.pop("tasks")
    task = Mixture(tasks=made) if "tasks" in card else made[""]
    return Run(folder=folder, training=training, precision=precision, config=config, card=card, task=task, **found)


def checkpoint_path(run: Run, name: str) -> Path:
    """The file of a checkpoint: `best`, `last` (the one before where it is damaged), or the path of a file.

    Raises:
        UserError: There is no such file, or `last` cannot be used.
    """
    kept = {known: run.folder / FOLDER / f"{known}.ckpt" for known in CHECKPOINTS}
    path = kept.get(name, Path(name))
    is_there = is_checkpoint(path)
    if name == "last" and (is_there or is_checkpoint(path.with_name(PREVIOUS))):
        return find_last(path)
    if not is_there:
        found = [known for known, file in kept.items() if file.exists()]
        others = f"it has {' and '.join(found)}" if found else "it has none"
        what = f"the run {run.folder} has no {name}.ckpt" if name in kept else f"there is no checkpoint {name}"
        raise UserError(f"{what}: --ckpt is best, last or a file of the run, and {others}")
    return path


def load_checkpoint(config: PolicyConfig, path: Path) -> tuple[Policy, int]:
    """A run's policy with the weights of a checkpoint, in evaluation mode, and the step at which they were saved.

    Raises:
        UserError: The model cannot be loaded, or the checkpoint does not fit it.
    """
    policy = Policy.load(config)
    step = restore(policy, path)
    return policy.eval(), step


def open_policy(run: Run | None, config: PolicyConfig, *, ckpt: str | None, engine: GenerationEngine) -> Policy:
    """The policy of a run with the weights of a checkpoint, or a model as it is.

    It is without weights where those suffice that the engine has.

    Raises:
        UserError: The model or the checkpoint cannot be used.
    """
    if run is not None:
        return load_checkpoint(config, checkpoint_path(run, ckpt or "best"))[0]
    if ckpt is not None:
        raise UserError(f"--ckpt is for a run, and {config.name} is none: it has no {RUN_CARD}")
    return Policy.without_weights(config) if engine.has_own_weights else Policy.load(config, is_trained=False)


def _instantiated(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Tasks, policy configuration and length from the values that the run's files give.

    Raises:
        UserError: A value is of the wrong type, unknown, or names a class that is not there.
    """
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    kinds = {"tasks": dict[str, Task], "policy": PolicyConfig, "max_new_tokens": int}  # type: ignore[type-arg]
    for name, kind in kinds.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    try:
        return dict(vars(parser.instantiate(parser.parse_object(values))))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(f"the run {folder} cannot be opened: {plain(str(error))}") from error
