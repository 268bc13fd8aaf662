"""From the rows of a source to samples: every row is checked before training starts, and built when it is asked for.

The check covers the task's own keys, what the model can take, and the image itself, which is decoded once, in a pool of
threads: a header says nothing about a file that was cut off. A bad row is an error, or left out and counted when asked
for; it is never replaced by another row.
"""

import logging
import os
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Generic, Literal, TypeAlias, get_args

from lightning.pytorch.utilities import rank_zero_only
from rich.progress import track
from torch.utils.data import ConcatDataset, Subset

from perception_r1.data.image_cache import ImageCache
from perception_r1.data.images import ImageError, Size, check_image
from perception_r1.data.sources import DataError, Source, SourceRow
from perception_r1.data.sources.base import ItemT, Lazy
from perception_r1.errors import UserError
from perception_r1.records import ImageSource, Sample, TargetT, UnloadedSample
from perception_r1.rows import Row, RowError, short_repr
from perception_r1.task import Task

OnBadRow = Literal["error", "skip"]
ImageCheck = Literal["decode", "header"]
SampleCheck: TypeAlias = Callable[[UnloadedSample[Any]], None]
"""Raises a `UserError` when the model cannot take a sample."""

_log = logging.getLogger(__name__)
_NUM_SHOWN = 5
"""Sentences about left-out rows in the warning; a broken file would otherwise fill the screen."""
NUM_SILENT = 2000
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


def subset(items: Sequence[ItemT], indices: Sequence[int]) -> Sequence[ItemT]:
    """Some items of a sequence, in a given order."""
    return Lazy(Subset(items, indices).__getitem__, len(indices))  # type: ignore[arg-type]


def concat(parts: Sequence[Sequence[ItemT]]) -> Sequence[ItemT]:
    """Several sequences, one after another."""
    return Lazy(ConcatDataset(parts).__getitem__, sum(len(part) for part in parts))  # type: ignore[arg-type]


def load(
    source: Source,
    task: Task[TargetT, Any],
    *,
    name: str = "",
    on_bad_row: OnBadRow = "error",
    image_check: ImageCheck = "decode",
    check_sample: SampleCheck | None = None,
    cache: ImageCache | None = None,
) -> Sequence[UnloadedSample[TargetT]]:
    """Check the rows of a source.

    Args:
        source: Where the rows come from.
        task: The task that reads them.
        name: Of the source, for the samples.
        on_bad_row: Stop at the first bad row, or leave bad rows out and report them.
        image_check: Decode every image, or only read its beginning and its end, which takes a hundredth of the time.
        check_sample: Whether the model can take a sample.
        cache: Images that it knows to be good are not checked again.

    Returns:
        One sample per good row, in order.

    Raises:
        DataError: A bad row (with "error"), no usable row at all, or a source that cannot be read.
    """
    if on_bad_row not in get_args(OnBadRow):
        raise UserError(f"on_bad_row must be one of {', '.join(get_args(OnBadRow))}, got {on_bad_row!r}")
    kept: list[tuple[int, Size, str]] = []
    problems: list[str] = []
    options: dict[str, Any] = {"image_check": image_check, "check_sample": check_sample, "cache": cache}
    for number, checked in enumerate(check(source, task, **options)):
        if checked.sample is not None:
            kept.append((number, (checked.sample.width, checked.sample.height), checked.sample.id))
        elif checked.problem is not None:
            problems.append(checked.problem)
            if on_bad_row == "error":
                raise DataError(problems[0])
    if not kept:
        raise DataError(f"{source}: none of its {len(source)} rows can be used, the first because: {problems[0]}")
    if problems:
        _report(source, problems)
    return Lazy(partial(_kept_sample, source, task, name, kept), len(kept))


def check(
    source: Source,
    task: Task[TargetT, Any],
    *,
    image_check: ImageCheck = "decode",
    check_sample: SampleCheck | None = None,
    cache: ImageCache | None = None,
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
    is_silent = len(source) < NUM_SILENT or getattr(rank_zero_only, "rank", 0) != 0
    rows = iter(track(source, f"Checking {source}", total=len(source), disable=is_silent))
    try:
        while window := list(islice(rows, _WINDOW)):
            new = {str(row.image): row.image for row in window if row.image is not None and str(row.image) not in sizes}
            sizes |= zip(new, _sizes(list(new.values()), pool, cache, is_decoded=image_check == "decode"), strict=True)
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


def _sizes(
    sources: Sequence[ImageSource], pool: ThreadPoolExecutor, cache: ImageCache | None, *, is_decoded: bool
) -> Sequence[Size | ImageError]:
    """Sizes of images, or what is wrong with them."""

    def measure(chosen: Sequence[ImageSource]) -> list[Size | ImageError]:
        return list(pool.map(partial(_size, is_decoded=is_decoded), chosen))

    return measure(sources) if cache is None else cache.sizes(sources, measure, is_decoded=is_decoded)


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
            told = f"{size[0]} x {size[1]} pixels, got {row.values[key]}"
            raise RowError(f"{key}: must be that of the upright image, which has {told}")
    return _sample(row, task, size, _new_id(row, ids))


def _kept_sample(
    source: Source, task: Task[TargetT, Any], name: str, kept: Sequence[tuple[int, Size, str]], index: int
) -> UnloadedSample[TargetT]:
    """A good row, given by its index among those that are kept, as a sample."""
    number, size, sample_id = kept[index]
    return replace(_sample(source[number], task, size, sample_id), source=name)


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
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in name):
        raise RowError(f"id: must be a text without control characters, got {short_repr(value)}")
    if name in ids:
        raise RowError(f"id: must be unique, but {name!r} is also that of {ids[name]}")
    ids[name] = row.location
    return name


@rank_zero_only
def _report(source: Source, problems: list[str]) -> None:
    shown = "; ".join(problems[:_NUM_SHOWN]) + ("; ..." if len(problems) > _NUM_SHOWN else "")
    _log.warning("%s: %d of %d rows cannot be used and are left out: %s", source, len(problems), len(source), shown)
