"""One at a time: a file that is locked while a process works in a folder, and tells the others who that is.

The system gives the lock back when the process ends, however it ends. On a disk of the network it holds between
machines where the disk has locks (NFS as a rule); where it has none, a warning says so and the work goes on without.
"""

import errno
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock, Timeout

from perception_r1.errors import UserError

_log = logging.getLogger(__name__)


@contextmanager
def locked(folder: Path, work: str, *, name: str | None = None) -> Iterator[None]:
    """Keep other processes out of a folder.

    Args:
        folder: It need not exist yet.
        work: What is done there, for others: "a training".
        name: Of the file in the folder that is locked; None: one beside the folder, which is given its name.

    Raises:
        UserError: Another process is at work there; it says which, on which machine, and since when.
    """
    folder = folder.absolute()
    if not folder.name or "\0" in str(folder):
        raise UserError(f"{str(folder)!r} is no folder that can be written to; give another")
    path = folder.with_name(f".{folder.name}.lock") if name is None else folder / name
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise UserError(
            f"{folder} is in use by {_holder(path)}; wait until it is done, or give another folder"
        ) from None
    except OSError as error:
        is_no_folder = isinstance(error, PermissionError | FileExistsError | NotADirectoryError | FileNotFoundError)
        if is_no_folder or error.errno == errno.ENAMETOOLONG:
            raise UserError(f"{folder} cannot be written to ({error.strerror})") from error
        _log.warning("%s: the disk has no locks (%s), so nothing keeps others out.", folder, error.strerror or error)
        yield
        return
    try:
        _tell(path, work)
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # whoever has opened it meanwhile makes it anew
        lock.release()


def claim_version(folder: Path) -> Path:
    """Make the next of the folders `version_0`, `version_1`, ...; no two processes get the same."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        numbers = [path.name.removeprefix("version_") for path in folder.glob("version_*")]
        version = folder / f"version_{max((int(number) for number in numbers if number.isdecimal()), default=-1) + 1}"
        with suppress(FileExistsError):
            version.mkdir()
            return version


def _tell(path: Path, work: str) -> None:
    """Write down who works, at once whole or not at all."""
    now = datetime.now(UTC).isoformat(sep=" ", timespec="seconds")
    text = json.dumps({"work": work, "pid": os.getpid(), "host": socket.gethostname(), "since": now})
    with suppress(OSError):  # a disk that is full: the lock holds all the same
        path.write_text(text, encoding="utf-8")


def _holder(path: Path) -> str:
    """Who has locked a file."""
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        return f"{told['work']}, process {told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it has just begun
        return "another process"
