"""Several tasks in one run: each sample belongs to one of them, which the name of its source tells."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

from perception_r1.records import Sample
from perception_r1.task import Task


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Several tasks; a sample of the source "counting" or "counting/pixmo" belongs to the one named "counting".

    Attributes:
        tasks: By the name under which their metrics are logged.
    """

    tasks: Mapping[str, Task[Any, Any]]
    name = "all"


AnyTask: TypeAlias = Task[Any, Any] | Mixture
"""What a run is trained on."""


def tasks_of(task: AnyTask) -> Mapping[str, Task[Any, Any]]:
    """The tasks of a run by the name that stands before their metrics, which is empty where there is only one."""
    return task.tasks if isinstance(task, Mixture) else {"": task}


def part_of(task: AnyTask, source: str) -> str:
    """The name, as in `tasks_of`, of the task to which the samples of a source belong.

    >>> part_of(Mixture(tasks={}), "counting/pixmo")
    'counting'
    """
    return source.partition("/")[0] if isinstance(task, Mixture) else ""


def task_of_source(task: AnyTask, source: str) -> Task[Any, Any]:
    """The task to which the samples of a source belong."""
    return tasks_of(task)[part_of(task, source)]


def task_of(task: AnyTask, sample: Sample[Any]) -> Task[Any, Any]:
    """The task to which a sample belongs."""
    return task_of_source(task, sample.source)
