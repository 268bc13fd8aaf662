"""Reader of the project's own JSON lines: everything about every row is checked before training starts.

The check covers the JSON, the task's own keys, and the picture itself, which is decoded once, in a pool of threads: a
header says nothing about a file that was cut off. A bad row is an error, or left out and counted when asked for; it is
never replaced by another row.
"""

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track

from perception_r1.data.images import ImageError, check_image
from perception_r1.data.rows import Row, RowError
from perception_r1.errors import UserError
from perception_r1.records import Sample
from perception_r1.task import Task

OnBadRow = Literal["error", "skip"]
TargetT = TypeVar("TargetT")

_log = logging.getLogger(__name__)
_NUM_SHOWN = 5
"""Sentences about left-out rows in the warning; a broken file would otherwise fill the screen."""
_NUM_SILENT = 2000
"""Rows that are read without a progress bar: a few seconds of work."""


class DataError(UserError):
    """A data file that cannot be used; the message names file, line and key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """One line of the file: its values with the file of its picture, or what is wrong with it."""

    number: int
    values: dict[str, Any]
    image: Path
    problem: str | None = None


def load(path: Path, task: Task[TargetT, Any], on_bad_row: OnBadRow = "error") -> list[Sample[TargetT]]:
    """Read and check a file of the project's own format; see `rows.py` for the keys.

    Args:
        path: The file; paths of images in it are relative to its folder.
        task: The task that reads the rows.
        on_bad_row: Stop at the first bad row, or leave bad rows out and report them.

    Returns:
        One sample per good row, in order, with the file of its image, which is not kept in memory.

    Raises:
        DataError: A bad row (with "error"), no usable row at all, or no such file.
    """
    if on_bad_row not in get_args(OnBadRow):
        raise UserError(f"on_bad_row must be one of {', '.join(get_args(OnBadRow))}, got {on_bad_row!r}")
    lines = list(_lines(path))
    if not lines:
        raise DataError(f"{path}: is empty, it needs one JSON object per line")
    samples: list[Sample[TargetT]] = []
    problems: list[str] = []
    ids: dict[str, int] = {}
    pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
    try:
        images = dict.fromkeys(line.image for line in lines if line.problem is None)  # each once, in order
        sizes = {image: pool.submit(check_image, image) for image in images}
        is_silent = len(lines) < _NUM_SILENT or getattr(rank_zero_only, "rank", 0) != 0
        for line in track(lines, f"Checking {path}", disable=is_silent):
            try:
                samples.append(_sample(line, task, sizes, ids))
            except (RowError, ImageError) as error:
                problems.append(f"{path}:{line.number}: {error}")
                if on_bad_row == "error":
                    raise DataError(problems[0]) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if not samples:
        raise DataError(f"{path}: none of its {len(lines)} rows can be used, the first because: {problems[0]}")
    if problems:
        _report(path, problems, len(lines))
    return samples


def _lines(path: Path) -> Iterator[_Line]:
    """The lines that are not blank."""
    try:
        with path.open("rb") as file:
            for number, data in enumerate(file, start=1):
                if data.strip():
                    yield _parsed(number, data, path.parent)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error


def _parsed(number: int, data: bytes, folder: Path) -> _Line:
    problem = None
    try:
        values = json.loads(data.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise RowError("the line must be a JSON object in braces")
        image = folder / Row(values, width=1, height=1).text("image")
        return _Line(number=number, values=values, image=image)
    except RowError as error:
        problem = str(error)
    except UnicodeDecodeError:
        problem = "the line must be UTF-8 text"
    except (ValueError, RecursionError) as error:
        problem = f"the line must be a JSON object ({error})"
    return _Line(number=number, values={}, image=folder, problem=problem)


def _sample(
    line: _Line, task: Task[TargetT, Any], sizes: dict[Path, Future[tuple[int, int]]], ids: dict[str, int]
) -> Sample[TargetT]:
    """The sample of one line.

    Raises:
        RowError: The row is bad.
    """
    if line.problem is not None:
        raise RowError(line.problem)
    try:
        width, height = sizes[line.image].result()
    except ImageError as error:
        raise RowError(f"image: {error}") from error
    row = Row(line.values, width=width, height=height)
    for key, size in (("width", width), ("height", height)):
        if key in row and row.integer(key, minimum=1) != size:
            raise RowError(
                f"{key}: must be that of the upright image, which has {width} x {height} pixels, got {row.values[key]}"
            )
    query, target = task.read_row(row)
    return Sample(
        id=_new_id(row, line.number, ids), image=line.image, width=width, height=height, query=query, target=target
    )


def _new_id(row: Row, number: int, ids: dict[str, int]) -> str:
    """The row's id, else the number of its line; `ids` holds those of the lines before."""
    value = row.values.get("id")
    if value is None:
        value = number
    elif isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"id: must be a text or a whole number, got {value!r}")
    name = str(value)
    if name in ids:
        raise RowError(f"id: must be unique, but {name!r} is also that of line {ids[name]}")
    ids[name] = number
    return name


@rank_zero_only
def _report(path: Path, problems: list[str], num_rows: int) -> None:
    shown = "; ".join(problems[:_NUM_SHOWN]) + ("; ..." if len(problems) > _NUM_SHOWN else "")
    _log.warning("%s: %d of %d rows cannot be used and are left out: %s", path, len(problems), num_rows, shown)
