"""What is known of images from earlier checks, so that no image is decoded twice: not by another run, nor by each rank.

One SQLite file in the user's cache folder (`PERCEPTION_R1_CACHE` names another) has the size of every good image, under
its path, its number of bytes and the time of its last change. Bad images are not kept: what was wrong may be over. One
process at a time checks; others that want the same images wait, and read what it found. A file that cannot be used, by
damage or by permissions, costs time only.
"""

import os
import sqlite3
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TypeAlias

from perception_r1.data.images import ImageError, Size
from perception_r1.records import ImageBytes, ImageSource

Measure: TypeAlias = Callable[[Sequence[ImageSource]], Sequence[Size | ImageError]]
"""Checks images; see `check_image`."""
_Identity: TypeAlias = tuple[bytes, int, int]
"""Absolute path, number of bytes, and nanoseconds of the last change."""

_TABLE = """
CREATE TABLE IF NOT EXISTS images (
    path BLOB PRIMARY KEY, num_bytes INTEGER NOT NULL, changed INTEGER NOT NULL, is_decoded INTEGER NOT NULL,
    width INTEGER NOT NULL, height INTEGER NOT NULL
) WITHOUT ROWID"""
_LOCK_SECONDS = 2.0
"""How long to wait for another process before looking at what it has found so far."""
_PATIENCE_SECONDS = 900.0
"""After so long without news of an image the other process hangs, and the image is checked without waiting."""


class ImageCache:
    """Sizes of images that were found to be good.

    Args:
        path: Its file; None: that of the user.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = cache_folder() / "checked-images.sqlite" if path is None else path

    def sizes(self, sources: Sequence[ImageSource], measure: Measure, *, is_decoded: bool) -> list[Size | ImageError]:
        """The size of each image, or what is wrong with it; `measure` gets those that are not known.

        Args:
            sources: Different images.
            measure: Checks some of them.
            is_decoded: It decodes them; otherwise it reads headers, which says less.
        """
        # taken before the check, so that a change during it is noticed
        identities = {index: identity for index, source in enumerate(sources) if (identity := _identity(source))}
        found: dict[int, Size | ImageError] = {}

        def check(indices: Sequence[int]) -> dict[int, Size | ImageError]:
            return dict(zip(indices, measure([sources[index] for index in indices]), strict=True)) if indices else {}

        try:
            with closing(self._open()) as database:
                _find_or_check(database, identities, check, is_decoded, found)
        except (OSError, sqlite3.OperationalError):  # no place to write, no locks on this disk, a disk that is full
            pass
        except sqlite3.DatabaseError:
            self.path.unlink(missing_ok=True)  # it is damaged; whoever has it open keeps what he has
        found |= check([index for index in range(len(sources)) if index not in found])
        return [found[index] for index in range(len(sources))]

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        database = sqlite3.connect(self.path, timeout=_LOCK_SECONDS, isolation_level=None)
        try:
            database.execute(_TABLE)
        except sqlite3.Error:
            database.close()
            raise
        return database


def cache_folder() -> Path:
    """Where files lie that any run may use again."""
    own = os.environ.get("PERCEPTION_R1_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(own) if own else Path(shared) / "perception-r1"


def _find_or_check(
    database: sqlite3.Connection,
    wanted: Mapping[int, _Identity],
    check: Callable[[Sequence[int]], dict[int, Size | ImageError]],
    is_decoded: bool,
    found: dict[int, Size | ImageError],
) -> None:
    """Fill `found` with what is known, and with what the check says of the rest, while others wait."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        news = _find(database, {index: wanted[index] for index in wanted if index not in found}, is_decoded)
        found |= news
        missing = [index for index in wanted if index not in found]
        if not missing:
            return
        if news:
            deadline = time.monotonic() + _PATIENCE_SECONDS
        if database.in_transaction:
            checked = check(missing)
            found |= checked
            good = [(index, size) for index, size in checked.items() if not isinstance(size, ImageError)]
            rows = [(*wanted[index], is_decoded, *size) for index, size in good]
            database.executemany("INSERT OR REPLACE INTO images VALUES (?, ?, ?, ?, ?, ?)", rows)
            database.execute("COMMIT")
            return
        try:
            database.execute("BEGIN IMMEDIATE")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY:
                raise
            # another process is at work: see what it has found so far


def _find(database: sqlite3.Connection, wanted: Mapping[int, _Identity], is_decoded: bool) -> dict[int, Size]:
    """The sizes of those images that were checked as they are now."""
    paths = [path for path, _, _ in wanted.values()]
    query = f"SELECT * FROM images WHERE is_decoded >= ? AND path IN ({', '.join('?' * len(paths))})"
    rows = database.execute(query, (is_decoded, *paths)).fetchall()
    sizes = {(path, num_bytes, changed): (width, height) for path, num_bytes, changed, _, width, height in rows}
    return {index: sizes[identity] for index, identity in wanted.items() if identity in sizes}


def _identity(source: ImageSource) -> _Identity | None:
    """What tells the content of a file; None where there is none, and for an image in a table."""
    if isinstance(source, ImageBytes):
        return None
    try:
        status = source.stat()
    except (OSError, ValueError):
        return None
    return os.fsencode(os.path.abspath(source)), status.st_size, status.st_mtime_ns
