"""The tasks, one file each. A new file in this folder is found by itself; nothing else needs an edit."""

from importlib import import_module
from pkgutil import iter_modules
from typing import Any

from perception_r1.task import Task


def _find_tasks() -> dict[str, type[Task[Any, Any]]]:
    """Import every module of this folder and collect the tasks that they define."""
    tasks: dict[str, type[Task[Any, Any]]] = {}
    for module_info in iter_modules(__path__):
        module = import_module(f"{__name__}.{module_info.name}")
        for value in vars(module).values():
            if not (isinstance(value, type) and issubclass(value, Task) and value.__module__ == module.__name__):
                continue
            if value.name in tasks:
                raise ValueError(
                    f"two tasks are named {value.name!r}: {tasks[value.name].__module__}, {value.__module__}"
                )
            tasks[value.name] = value
    return tasks


TASKS: dict[str, type[Task[Any, Any]]] = _find_tasks()
"""Every task by `Task.name`."""
