"""What the commands beside the trainer share: options, a task made of them, and the one sentence of an error."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from perception_r1.errors import UserError
from perception_r1.task import Task

ValueT = TypeVar("ValueT")
_SIGTERM_STATUS = 143
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
"""Errors of a disk that is full or cannot be written to."""
_PATH_ERRORS = (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path that may not be used, or cannot."""
_MOST_TOLD = 300
"""Characters of a path."""
_UNION = re.compile(
    r"Does not validate against any of the Union subtypes .*? Errors: - (.*?)"
    r"(?: - Expected a (?:<class 'NoneType'>|NoneType))* Given value type: .*"
)
"""How jsonargparse tells why none of several types fits; what matters is between."""


def run_command(name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; an error that speaks to the user ends in its sentence on stderr, any other in a traceback.

    Returns:
        The exit status of the command, 2 after a user's error, 143 after SIGTERM.
    """
    try:
        return command(argv)
    except SystemExit as end:  # --help, or Lightning's way to stop
        is_terminated = type(end).__name__ == "SIGTERMException"  # Lightning's, which is not imported for `score`
        if is_terminated or isinstance(end.__context__, KeyboardInterrupt):
            what = "SIGTERM" if is_terminated else "Ctrl-C"
            sys.stderr.write(f"Stopped by {what}; --ckpt_path last goes on from the last checkpoint.\n")
        return _SIGTERM_STATUS if is_terminated else end.code if isinstance(end.code, int) else 0
    except Exception as error:
        sentence = _sentence(error)
        if sentence is None or os.environ.get("PERCEPTION_R1_TRACEBACK"):
            raise
        sys.stderr.write(f"{f'perception-r1 {name}'.strip()}: error: {sentence}\n")
        return 2


def _sentence(error: BaseException | None) -> str | None:
    """What speaks to the user in an error, which the parser may have wrapped in errors of its own; None if nothing."""
    lightning = sys.modules.get("lightning.fabric.utilities.exceptions")
    told = (UserError, lightning.MisconfigurationException) if lightning else UserError
    refused = None
    while error is not None and not isinstance(error, told):
        if isinstance(error, OSError) and error.errno in (*_DISK_ERRORS, *_PATH_ERRORS):
            name = os.fsdecode(error.filename)[:_MOST_TOLD] if error.filename else "a file"
            refused = f"{name} cannot be opened ({error.strerror})"
            if error.errno in _DISK_ERRORS:
                refused = f"{name} cannot be written ({error.strerror}); make room or give another folder"
        error = error.__cause__ or error.__context__
    return refused if error is None else " ".join(str(error).split())


def new_parser(name: str, description: str, epilog: str | None = None) -> jsonargparse.ArgumentParser:
    """A parser for `parse`."""
    return jsonargparse.ArgumentParser(
        prog=f"perception-r1 {name}", description=description, epilog=epilog, exit_on_error=False
    )


def parse(parser: jsonargparse.ArgumentParser, argv: Sequence[str]) -> jsonargparse.Namespace:
    """The options of a command line.

    Raises:
        UserError: The command line is wrong.
    """
    try:
        return parser.parse_args(list(argv))
    except (argparse.ArgumentError, jsonargparse.ArgumentError) as error:
        raise UserError(plain(str(error))) from error


def plain(message: str) -> str:
    r"""A parser's message on one line, in the words of the command line.

    >>> plain("Parser key \"think\":\n  Expected a <class 'bool'>. Got value: maybe")
    '--think: Expected a bool. Got value: maybe'
    """
    message = _UNION.sub(r"\1", " ".join(message.split()))
    message = re.sub(r'Parser key "([\w.]+)":', r"--\1:", message)
    return re.sub(r"<class '(\w+)'>|typing\.", r"\1", message)


def first_options(argv: Sequence[str], *names: str) -> tuple[dict[str, list[str]], list[str]]:
    """All values of a few options, taken out before the parser of the others can be made.

    Returns:
        The values of each option that was given, and what is left.

    Raises:
        UserError: An option has no value.

    >>> first_options(["fit", "--task", "ocr", "--model.seed=1", "--task=counting"], "task", "model")
    ({'task': ['ocr', 'counting']}, ['fit', '--model.seed=1'])
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for name in names:
        parser.add_argument(f"--{name}", action="append")
    try:
        found, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    return {name: values for name, values in vars(found).items() if values is not None}, rest


def option_value(argv: Sequence[str], option: str) -> str | None:
    """The last value of an option, read before the parser that would know it can be made.

    >>> option_value(["a.jsonl", "--task", "ocr", "--think=true"], "--task")
    'ocr'
    """
    name = option.removeprefix("--")
    return first_options(argv, name)[0].get(name, [None])[-1]


def first_positional(argv: Sequence[str]) -> str | None:
    """The first argument that is no option, where every option has exactly one value.

    >>> first_positional(["--query", "red cup", "--out=boxes", "model", "a.png"])
    'model'
    """
    is_value = False
    for word in argv:
        if not is_value and not word.startswith("-"):
            return word
        is_value = not is_value and word.startswith("--") and "=" not in word
    return None


def known(option: str, name: str, choices: Mapping[str, ValueT]) -> ValueT:
    """What the name of an option stands for.

    Raises:
        UserError: Nothing has this name.
    """
    if name not in choices:
        raise UserError(f"{option} must be one of {', '.join(choices)}, not {name!r}")
    return choices[name]


def task_values(task_class: type[Task[Any, Any]], options: jsonargparse.Namespace) -> dict[str, Any]:
    """The options that a parser with the arguments of a task has read for it."""
    return {field.name: options[field.name] for field in fields(task_class)}


def make_task(task_class: type[Task[Any, Any]], values: Mapping[str, Any]) -> Task[Any, Any]:
    """A task with its options.

    Raises:
        UserError: The task refuses them.
    """
    try:
        return task_class(**values)
    except ValueError as error:
        raise UserError(f"options of {task_class.name}: {error}") from error


def check_unused(option: str, folder: Path) -> None:
    """Refuse a folder to write to in which something lies already.

    Raises:
        UserError: It is a file, or a folder that is not empty.
    """
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{option} {folder} exists and is not an empty folder: give another, nothing is overwritten")
