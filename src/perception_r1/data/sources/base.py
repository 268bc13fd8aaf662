"""What a data source is: annotated images by number, as rows of the project's own form (`rows.py`).

Whatever a data set looks like on disk, its reader says no more than how one of its entries becomes such a row; checks,
splits, conversion and statistics then are the same for all.
"""

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from perception_r1.errors import UserError
from perception_r1.records import ImageSource
from perception_r1.rows import object_labels

ItemT = TypeVar("ItemT")
ContentT = TypeVar("ContentT")
SHA256 = re.compile(r"[0-9a-f]{64}")
"""A digest in hex."""


class DataError(UserError):
    """Data that cannot be used; the message names file, line and key, all in one line."""

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceRow:
    """One row of a source, not yet checked.

    Attributes:
        location: Where it is, for messages: "cups.jsonl:12".
        number: Its number there, from 1 on; it stands for the id of a row that has none.
        values: The row in the project's own form, without its image.
        image: Its image; None where there is a problem.
        problem: Why the entry cannot be a row at all.
    """

    location: str
    number: int
    values: Mapping[str, object]
    image: ImageSource | None = None
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Download:
    """A file to fetch.

    Attributes:
        url: Where it is.
        sha256: Hex digest of its content.
        path: Where it goes.
    """

    url: str
    sha256: str
    path: Path


class Lazy(Sequence[ItemT]):
    """Items that a function makes of their numbers, each when it is asked for."""

    def __init__(self, make: Callable[[int], ItemT], size: int) -> None:
        self._make, self._size = make, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: Any) -> Any:
        chosen = range(self._size)[index]
        return self._make(chosen) if isinstance(chosen, int) else [self._make(item) for item in chosen]


class Source(ABC):
    """Rows by number. Only an index is in memory; images never are.

    Args:
        take: Which rows: "all", or "first:N", "last:N" or "random:N", where N is a number or a percentage ("10%").
        seed: Of the random ones, which keep their order.

    Raises:
        UserError: `take` is none of these.
    """

    images: Path | None = None
    """Folder of the images, where they are files."""

    def __init__(self, *, take: str = "all", seed: int = 0) -> None:
        self.take, self.seed = take, seed
        _parse_take(take)

    @abstractmethod
    def read(self) -> Sequence[SourceRow]:
        """All rows, of which `take` selects; called once.

        Raises:
            DataError: The source cannot be read.
        """

    @abstractmethod
    def contents(self) -> Iterable[Path | str]:
        """What determines the rows: files by their content, anything else by name."""

    @abstractmethod
    def __str__(self) -> str:
        """Its name in messages."""

    @property
    def hub_id(self) -> str | None:
        """Id of the data set on the hub that it reads; None for files."""
        return None

    def labels(self) -> tuple[str, ...]:
        """Names of all categories of a detection data set, in the order of the prompt; by default those in use."""
        return tuple(sorted(object_labels(row.values for row in self)))

    def downloads(self) -> Iterable[Download]:
        """The images of the rows, where the source names them by URL; by default none.

        Raises:
            DataError: The source cannot be read.
        """
        return ()

    @cached_property
    def _rows(self) -> Sequence[SourceRow]:
        return self.read()

    @cached_property
    def numbers(self) -> Sequence[int]:
        """Which rows `take` selects.

        Raises:
            DataError: The source cannot be read or has fewer rows.
        """
        size = len(self._rows)
        try:
            return resolve_take(self.take, size, self.seed)
        except UserError as error:
            raise DataError(f"{self}: {error}") from error

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> SourceRow:
        return self._rows[self.numbers[index]]

    def __iter__(self) -> Iterator[SourceRow]:
        return (self._rows[number] for number in self.numbers)

    def fingerprint(self) -> str:
        """A hex digest of everything that determines the rows."""
        parts = [_sha256(item) if isinstance(item, Path) else item for item in self.contents()]
        return hashlib.sha256("\n".join([type(self).__name__, self.take, str(self.seed), *parts]).encode()).hexdigest()


def once_per_file(read: Callable[[Path], ContentT]) -> Callable[[Path], ContentT]:
    """Make a reader share what it has read among all who ask for the same file while it does not change.

    The content is kept as long as one of them keeps it; it must be weakly referenceable, and nobody may change it.
    """
    kept: WeakValueDictionary[tuple[Path, int, int], ContentT] = WeakValueDictionary()

    def read_once(path: Path) -> ContentT:
        identity = _identity(path)
        content = None if identity is None else kept.get(identity)
        if content is None:
            content = read(path)  # which says what is wrong with a file that is not there
            if identity is not None:
                kept[identity] = content
        return content

    return read_once


def _identity(path: Path) -> tuple[Path, int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return path.absolute(), status.st_size, status.st_mtime_ns


def resolve_take(take: str, size: int, seed: int) -> Sequence[int]:
    """Indices of the rows that `take` means (see `Source`), in ascending order.

    >>> resolve_take("first:3", 10, 0), resolve_take("last:20%", 10, 0)
    (range(0, 3), range(8, 10))
    >>> resolve_take("random:30%", 10, seed=1)
    [1, 2, 4]

    Raises:
        UserError: There are not so many rows.
    """
    kind, number, is_percent = _parse_take(take)
    if kind == "all":
        return range(size)
    count = max(1, round(size * number / 100)) if is_percent else int(number)
    if count > size:
        raise UserError(f"take: {take!r} asks for {count} rows, but there are only {size}")
    if kind == "random":
        return sorted(random.Random(seed).sample(range(size), count))
    return range(count) if kind == "first" else range(size - count, size)


def _parse_take(take: str) -> tuple[str, float, bool]:
    """Kind, number, and whether the number is a percentage."""
    kind, _, amount = take.partition(":")
    is_percent = amount.endswith("%")
    try:
        number = float(amount.removesuffix("%")) if is_percent else int(amount or 0)
    except ValueError:
        number = -1
    is_sound = 0 < number <= 100 if is_percent else number > 0
    if take != "all" and not (kind in ("first", "last", "random") and is_sound):
        raise UserError(
            f'take must be "all", "first:N", "last:N" or "random:N", N a number or a percentage, not {take!r}'
        )
    return kind, number, is_percent


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
