"""From the rows of a source to samples: every row is checked before training starts, and built when it is asked for.

The check covers the task's own keys, what the model can take, and the image itself, which is decoded once, in a pool of
threads: a header says nothing about a file that was cut off. A bad row is an error, or left out and counted when asked
for; it is never replaced by another row.
"""

import logging
import os
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, islice
from typing import Any, Generic, Literal, TypeAlias, TypeVar, get_args

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track

from perception_r1.data.images import ImageError, check_image
from perception_r1.data.sources import DataError, Source, SourceRow
from perception_r1.errors import UserError
from perception_r1.records import ImageSource, Sample, TargetT, UnloadedSample
from perception_r1.rows import Row, RowError, short_repr
from perception_r1.task import Task

OnBadRow = Literal["error", "skip"]
ImageCheck = Literal["decode", "header"]
Size: TypeAlias = tuple[int, int]
"""Width and height in pixels."""
SampleCheck: TypeAlias = Callable[[UnloadedSample[Any]], None]
"""Raises a `UserError` when the model cannot take a sample."""
ItemT = TypeVar("ItemT")

_log = logging.getLogger(__name__)
_NUM_SHOWN = 5
"""Sentences about left-out rows in the warning; a broken file would otherwise fill the screen."""
_NUM_SILENT = 2000
"""Rows that are read without a progress bar: a few seconds of work."""
_WINDOW = 1024
"""Rows whose images are checked side by side."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckedRow(Generic[TargetT]):
    """A row after its check.

    Attributes:
        sample: Its sample; None where the row is bad.
        problem: Why it is bad, with its location.
    """

    sample: UnloadedSample[TargetT] | None = None
    problem: str | None = None


class SourceSamples(Sequence[UnloadedSample[TargetT]]):
    """The good rows of a source as samples; only numbers, ids and sizes are in memory."""

    def __init__(self, source: Source, task: Task[TargetT, Any], name: str) -> None:
        self._source, self._task, self._name = source, task, name
        self._numbers, self._widths, self._heights = array("q"), array("q"), array("q")
        self._ids: list[str] = []

    def add(self, number: int, sample: UnloadedSample[TargetT]) -> None:
        """Add a good row by its number in the source."""
        self._numbers.append(number)
        self._widths.append(sample.width)
        self._heights.append(sample.height)
        self._ids.append(sample.id)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[item] for item in range(*index.indices(len(self)))]
        size = self._widths[index], self._heights[index]
        sample = _sample(self._source[self._numbers[index]], self._task, size, self._ids[index])
        return replace(sample, source=self._name)


class ConcatSamples(Sequence[ItemT]):
    """Several sequences, one after another."""

    def __init__(self, parts: Sequence[Sequence[ItemT]]) -> None:
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[item] for item in range(*index.indices(len(self)))]
        position = range(len(self))[index]
        part = bisect_right(self._ends, position)
        return self._parts[part][position - (self._ends[part - 1] if part else 0)]


class Subset(Sequence[ItemT]):
    """Some items of a sequence, in a given order."""

    def __init__(self, items: Sequence[ItemT], indices: Sequence[int]) -> None:
        self._items, self._indices = items, indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._items[item] for item in self._indices[index]]
        return self._items[self._indices[index]]


def load(
    source: Source,
    task: Task[TargetT, Any],
    *,
    name: str = "",
    on_bad_row: OnBadRow = "error",
    image_check: ImageCheck = "decode",
    check_sample: SampleCheck | None = None,
) -> SourceSamples[TargetT]:
    """Check the rows of a source.

    Args:
        source: Where the rows come from.
        task: The task that reads them.
        name: Of the source, for the samples.
        on_bad_row: Stop at the first bad row, or leave bad rows out and report them.
        image_check: Decode every image, or only read its header, which takes a hundredth of the time.
        check_sample: Whether the model can take a sample.

    Returns:
        One sample per good row, in order.

    Raises:
        DataError: A bad row (with "error"), no usable row at all, or a source that cannot be read.
    """
    if on_bad_row not in get_args(OnBadRow):
        raise UserError(f"on_bad_row must be one of {', '.join(get_args(OnBadRow))}, got {on_bad_row!r}")
    samples, problems = SourceSamples(source, task, name), []
    for number, checked in enumerate(check(source, task, image_check=image_check, check_sample=check_sample)):
        if checked.sample is not None:
            samples.add(number, checked.sample)
        elif checked.problem is not None:
            problems.append(checked.problem)
            if on_bad_row == "error":
                raise DataError(problems[0])
    if not samples:
        first = f", the first because: {problems[0]}" if problems else ""
        raise DataError(f"{source}: none of its {len(source)} rows can be used{first}")
    if problems:
        _report(source, problems)
    return samples


def check(
    source: Source,
    task: Task[TargetT, Any],
    *,
    image_check: ImageCheck = "decode",
    check_sample: SampleCheck | None = None,
) -> Iterator[CheckedRow[TargetT]]:
    """The rows of a source with their samples or what is wrong with them, in order; for the arguments see `load`.

    Raises:
        DataError: The source cannot be read or is empty.
    """
    if image_check not in get_args(ImageCheck):
        raise UserError(f"image_check must be one of {', '.join(get_args(ImageCheck))}, got {image_check!r}")
    if not len(source):
        raise DataError(f"{source}: is empty, it needs at least one row")
    sizes: dict[str, Size | ImageError] = {}
    ids: dict[str, str] = {}
    pool = ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1))
    is_silent = len(source) < _NUM_SILENT or getattr(rank_zero_only, "rank", 0) != 0
    rows = iter(track(source, f"Checking {source}", total=len(source), disable=is_silent))
    try:
        while window := list(islice(rows, _WINDOW)):
            new = {str(row.image): row.image for row in window if row.image is not None and str(row.image) not in sizes}
            size_of = partial(_size, is_decoded=image_check == "decode")
            sizes |= zip(new, pool.map(size_of, new.values()), strict=True)
            for row in window:
                try:
                    sample = _checked_sample(row, task, sizes, ids)
                    if check_sample is not None:
                        check_sample(sample)
                    yield CheckedRow(sample=sample)
                except (RowError, UserError) as error:
                    yield CheckedRow(problem=" ".join(f"{row.location}: {error}".splitlines()))
    finally:
        pool.shutdown(cancel_futures=True)


def _size(source: ImageSource, *, is_decoded: bool) -> Size | ImageError:
    try:
        return check_image(source, is_decoded=is_decoded)
    except ImageError as error:
        return error


def _checked_sample(
    row: SourceRow, task: Task[TargetT, Any], sizes: dict[str, Size | ImageError], ids: dict[str, str]
) -> UnloadedSample[TargetT]:
    """The sample of a row; `ids` holds those of the rows before, with their locations.

    Raises:
        RowError: The row is bad.
    """
    if row.image is None:
        raise RowError(row.problem or "image: is missing, the row needs a text here")
    size = sizes[str(row.image)]
    if isinstance(size, ImageError):
        raise RowError(f"image: {size}")
    values = Row(row.values, width=size[0], height=size[1])
    for key, length in zip(("width", "height"), size, strict=True):
        if key in values and values.integer(key, minimum=1) != length:
            raise RowError(
                f"{key}: must be that of the upright image, which has {size[0]} x {size[1]} pixels, "
                f"got {row.values[key]}"
            )
    return _sample(row, task, size, _new_id(row, ids))


def _sample(row: SourceRow, task: Task[TargetT, Any], size: Size, name: str) -> UnloadedSample[TargetT]:
    width, height = size
    query, target = task.read_row(Row(row.values, width=width, height=height))
    if row.image is None:
        raise RowError("image: is missing")
    return Sample(id=name, image=row.image, width=width, height=height, query=query, target=target, row=row.values)


def _new_id(row: SourceRow, ids: dict[str, str]) -> str:
    """The row's id, else its number."""
    value = row.values.get("id")
    if value is None:
        value = row.number
    elif isinstance(value, bool) or not isinstance(value, str | int):
        raise RowError(f"id: must be a text or a whole number, got {short_repr(value)}")
    name = str(value)
    if name in ids:
        raise RowError(f"id: must be unique, but {name!r} is also that of {ids[name]}")
    ids[name] = row.location
    return name


@rank_zero_only
def _report(source: Source, problems: list[str]) -> None:
    shown = "; ".join(problems[:_NUM_SHOWN]) + ("; ..." if len(problems) > _NUM_SHOWN else "")
    _log.warning("%s: %d of %d rows cannot be used and are left out: %s", source, len(problems), len(source), shown)
