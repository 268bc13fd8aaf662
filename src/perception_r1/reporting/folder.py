"""What a run or an evaluation left in its folder, as a record; what is not there is left out, for a run may go on."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from perception_r1.callbacks.files import CONFIG, EVALUATION_CARD, IMAGES, PREDICTIONS, RUN_CARD
from perception_r1.errors import UserError
from perception_r1.reporting.answers import Answer, Answers, read_answers
from perception_r1.reporting.values import class_name, init_args, mapping, numbers

_METRICS, _MARGINS = "metrics.json", "margins_of_error.json"
"""The first makes a folder an evaluation."""
TIMES = ("before", "after")
"""When a run is evaluated; an evaluation has answers and metrics "after" alone."""


class Metric(NamedTuple):
    """A metric by its task and by its name, which begins with that of the source where a task has several."""

    task: str
    name: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """A run or an evaluation.

    Attributes:
        folder: Where it lies.
        card: `run.json`, or `evaluation.json`.
        is_evaluation: It is an evaluation of a model, not a training.
        config: `config.yaml`.
        values: Greedy metrics on the test split before and after training, as the files name them.
        widths: Half the width of the 95 % confidence interval of each, where it is known.
    """

    folder: Path
    card: Mapping[str, Any]
    is_evaluation: bool
    config: Mapping[str, Any]
    values: Mapping[str, Mapping[str, float]]
    widths: Mapping[str, Mapping[str, float]]

    @property
    def training(self) -> str:
        """The name of the class that trained: GRPO or SFT."""
        return "Evaluation" if self.is_evaluation else class_name(self.config.get("model")) or "Training"

    @property
    def status(self) -> str:
        """How it ended, if it has."""
        return "finished" if self.is_evaluation else str(self.card.get("status", "unknown"))

    @cached_property
    def tasks(self) -> Mapping[str, Mapping[str, Any]]:
        """Settings of the task of each part; the name of the only part is empty."""
        if not self.is_evaluation:
            tasks = mapping(self.card.get("tasks")) or {"": self.card.get("task")}
        else:
            data = init_args(self.config.get("data"))
            tasks = {name: init_args(part).get("task") for name, part in mapping(data.get("tasks")).items()}
            tasks = tasks or {"": data.get("task")}
        return {name: mapping(task) for name, task in tasks.items()}

    @cached_property
    def task_names(self) -> Mapping[str, str]:
        """Name of the task of each part."""
        return {part: class_name(task).lower() or part for part, task in self.tasks.items()}

    def prompt(self, task: str, query: str) -> str:
        """The text beside the image."""
        found = [self.tasks[part] for part, name in self.task_names.items() if name == task]
        options = init_args(found[0]) if found else {}
        names = options.get("categories")
        labels = ", ".join(map(str, names)) if isinstance(names, list) else "{labels}"
        return str(options.get("prompt_template", "{query}")).replace("{labels}", labels).replace("{query}", query)

    @property
    def model(self) -> str:
        """The model that was trained or evaluated."""
        policy = mapping(init_args(self.config.get("model")).get("policy"))
        return str(mapping(self.card.get("policy")).get("name") or policy.get("name") or "unknown")

    @property
    def primary_metrics(self) -> frozenset[Metric]:
        """Those by which checkpoints are compared."""
        found = self.card.get("primary_metrics")
        return frozenset(self._metric(str(name)) for name in (found if isinstance(found, list) else ()))

    def metrics(self, when: str) -> Mapping[Metric, float]:
        """Greedy metrics on the test split."""
        return {self._metric(name): value for name, value in self.values[when].items()}

    def margins(self, when: str) -> Mapping[Metric, float]:
        """Half the width of the 95 % confidence interval of each metric, where it is known."""
        return {self._metric(name): value for name, value in self.widths[when].items()}

    def _metric(self, name: str) -> Metric:
        part, _, rest = name.partition("/")
        if "" in self.task_names:
            return Metric(self.task_names[""], name)
        return Metric(self.task_names.get(part, ""), rest if part in self.task_names else name)

    @cached_property
    def answers(self) -> Mapping[str, Answers]:
        """Answers before and after, to the test split; until a run comes to its end, to some samples of validation."""
        if self.is_evaluation:
            return {"before": {}, "after": read_answers(self.folder / f"{PREDICTIONS}.jsonl", self.task_names)}
        return {when: read_answers(self._answers_folder / f"{when}.jsonl", self.task_names) for when in TIMES}

    @property
    def split(self) -> str:
        """Which samples `answers` answer."""
        if self.is_evaluation:
            return str(init_args(self.config.get("data")).get("eval_split") or "test")
        return self._answers_folder.name

    @property
    def _answers_folder(self) -> Path:
        if self.is_evaluation:
            return self.folder
        folder = self.folder / PREDICTIONS
        return folder / ("test" if (folder / "test" / "after.jsonl").is_file() else "val")

    def image(self, answer: Answer) -> Path | None:
        """The small picture of what was answered, where one was kept."""
        path = self._answers_folder / IMAGES / answer.image_name
        return path if path.is_file() else None


def read_record(folder: Path) -> Record:
    """Read what lies in a folder.

    Raises:
        UserError: It is neither that of a run nor that of an evaluation, or a file in it is damaged.
    """
    is_run = (folder / RUN_CARD).is_file()
    if not is_run and not (folder / _METRICS).is_file():
        raise UserError(
            f"{folder} is no run, which has a {RUN_CARD}, and no evaluation, which has a {_METRICS}: give folders such "
            "as logs/counting/version_0"
        )
    config = _read(folder / CONFIG)
    if is_run:
        card = _read(folder / RUN_CARD) or {"status": "unknown"}
        margins = mapping(card.get("margins_of_error"))
        values, widths = ({when: numbers(found.get(when)) for when in TIMES} for found in (card, margins))
        return Record(folder=folder, card=card, is_evaluation=False, config=config, values=values, widths=widths)
    card = _read(folder / EVALUATION_CARD)
    values, widths = ({"before": {}, "after": _flat(_read(folder / name))} for name in (_METRICS, _MARGINS))
    return Record(folder=folder, card=card, is_evaluation=True, config=config, values=values, widths=widths)


def _flat(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics of all sources, named as a training names them: with the source before it where there are several."""
    is_one = len(metrics) == 1
    return {
        name if is_one else f"{source}/{name}": value
        for source, values in metrics.items()
        for name, value in numbers(values).items()
    }


def _read(path: Path) -> Mapping[str, Any]:
    """A file of JSON or YAML that holds names with values; nothing where it is not there.

    Raises:
        UserError: It cannot be read, or holds something else.
    """
    if not path.is_file():
        return {}
    try:
        text = path.read_text(encoding="utf-8")
        found = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {' '.join(str(error).split())})") from error
    if not isinstance(found, Mapping):
        raise UserError(f"{path} cannot be read: it must hold names with values")
    return mapping(found)
