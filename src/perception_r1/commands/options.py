"""What the commands beside the trainer share: options, a task made of them, and the one sentence of an error."""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import jsonargparse

from perception_r1.errors import UserError
from perception_r1.task import Task

ValueT = TypeVar("ValueT")


def run_command(name: str, command: Callable[[Sequence[str]], int], argv: Sequence[str]) -> int:
    """Run a command; a user's error is told in one sentence on stderr.

    Args:
        name: The command as it is called on the command line.
        command: From the arguments behind the name to an exit status.
        argv: The arguments.

    Returns:
        The exit status: that of the command, or 2 after a user's error.
    """
    try:
        return command(argv)
    except UserError as error:
        if os.environ.get("PERCEPTION_R1_TRACEBACK"):
            raise
        sys.stderr.write(f"perception-r1 {name}: error: {error}\n")
        return 2
    except SystemExit as end:  # --help
        return int(end.code or 0)


def new_parser(name: str, description: str, epilog: str | None = None) -> jsonargparse.ArgumentParser:
    """A parser for `parse_completion`."""
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
    message = re.sub(r'Parser key "(\w+)":', r"--\1:", " ".join(message.split()))
    return re.sub(r"<class '(\w+)'>|typing\.", r"\1", message)


def option_value(argv: Sequence[str], option: str) -> str | None:
    """The last value of an option, looked up before the parser that would know it can be made.

    >>> option_value(["a.jsonl", "--task", "ocr", "--think=true"], "--task")
    'ocr'
    """
    values = [word.partition("=")[2] for word in argv if word.startswith(f"{option}=")]
    values += [value for word, value in pairwise(argv) if word == option]
    return values[-1] if values else None


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
