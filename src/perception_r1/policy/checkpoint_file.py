"""A checkpoint in one file that proves itself: the zip archive that torch writes, its SHA-256 as the archive's comment.

The digest is taken while the file is written, and covers every byte in front of the comment; the comment itself is
compared as it is. So no byte can change unnoticed, and tools that read zip archives or torch's files read this one. The
checksums that torch writes for each tensor would not do: torch does not compare them, and they leave out what is
between. A digest tells damage, not malice: whoever can write the file can write a digest. Files are therefore read as
numbers and text alone (`weights_only`), and no code in them is ever run.
"""

import hashlib
import io
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from perception_r1.errors import UserError

_MARK = b"perception-r1 sha256 "
_COMMENT_LENGTH = len(_MARK) + 2 * hashlib.sha256().digest_size
_NO_COMMENT = b"\0\0"
"""How an archive without a comment ends: with its length in two bytes."""
_ZIP = b"PK\3\4"
_BLOCK = 1 << 23
_SHOWN = 4 << 30
"""Bytes from which on a progress bar is shown: some seconds of work."""

Identity: TypeAlias = tuple[int, int, int, int]
"""What tells whether a file is still the same: device, number, size and time of last change."""
Advance: TypeAlias = Callable[[int], None]
"""Is told of bytes that are done."""
_verified: dict[Identity, str] = {}
"""Digests of files that this process has verified: none is read twice for it."""


class DamagedCheckpointError(UserError):
    """A checkpoint that is not what one of our runs has written."""


class HashingWriter(io.BufferedIOBase):
    """A binary file that is written in one go, and the digest of what was written.

    Large pieces are hashed while they are written, in a thread.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._pool = ThreadPoolExecutor(1)

    def writable(self) -> bool:
        """It is."""
        return True

    def write(self, data: Any) -> int:
        """Write all of it."""
        hashed = self._pool.submit(self._digest.update, data)
        count = self._file.write(data)
        hashed.result()
        return count

    def tell(self) -> int:
        """Bytes so far."""
        return self._file.tell()

    def flush(self) -> None:
        """Hand everything to the system."""
        if not self._file.closed:
            self._file.flush()

    def fileno(self) -> int:
        """That of the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close the file."""
        self._pool.shutdown()
        self._file.close()
        super().close()

    def hexdigest(self) -> str:
        """The digest in hex digits."""
        return self._digest.hexdigest()


def save_file(checkpoint: Mapping[str, Any], path: Path) -> None:
    """Write a checkpoint."""
    handled = sys.exception()
    with path.open("wb") as file, HashingWriter(file) as writer:
        try:
            torch.save(checkpoint, writer)  # type: ignore[arg-type]  # it wants no more than to write
        except RuntimeError as error:  # what torch says of an archive that it cannot end, whatever broke it off
            if error.__context__ is None or error.__context__ is handled:
                raise
            raise error.__context__ from None
        comment = _MARK + writer.hexdigest().encode()
        file.seek(-len(_NO_COMMENT), os.SEEK_END)
        file.write(len(comment).to_bytes(2, "little") + comment)


def load_file(path: Path, *, is_mapped: bool = False) -> dict[str, Any]:
    """Read a checkpoint, once it has proved itself.

    Args:
        path: Its file.
        is_mapped: Tensors are read from the disk when they are used.

    Raises:
        DamagedCheckpointError: It is damaged, or no checkpoint of ours.
        UserError: It cannot be read.
    """
    while True:
        identity = verify_file(path)
        try:
            loaded = torch.load(path, map_location="cpu", mmap=is_mapped, weights_only=True)
            if identify(path.stat()) == identity:  # else a new one has taken its place meanwhile
                break
        except OSError as error:
            raise unreadable(path, error) from error
        except RuntimeError as error:  # by our hand, there is no memory for it
            raise UserError(f"The checkpoint {path} cannot be read: {str(error).splitlines()[0]}.") from error
        except Exception as error:  # whole, but not by our hand; what a reader of pickles raises has no end
            problem = f"The checkpoint {path} holds something else than numbers and text."
            raise DamagedCheckpointError(problem) from error
    if not isinstance(loaded, dict):
        raise DamagedCheckpointError(f"The checkpoint {path} was not written by a run of this program.")
    return loaded


def verify_file(path: Path) -> Identity:
    """Make sure that a file is what one of our runs has written, byte by byte; what was verified is not read again.

    Raises:
        DamagedCheckpointError: It is damaged, or no checkpoint of ours.
        UserError: It cannot be read.
    """
    try:
        with path.open("rb") as file:
            identity = identify(os.fstat(file.fileno()))
            if identity not in _verified:
                _verified[identity] = _verify(path, file)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(f"There is no checkpoint {path}.") from error
    except IsADirectoryError as error:
        raise DamagedCheckpointError(f"{path} is a folder, but not one of a checkpoint.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    return identity


def verify_digest(path: Path, expected: str, advance: Advance) -> None:
    """Make sure that a whole file has a digest; raises as `verify_file` does."""
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            identity = identify(status)
            if identity not in _verified:
                _verified[identity] = _hash(file, status.st_size, advance).hexdigest()
            if _verified[identity] != expected:
                raise _damaged(path)
    except FileNotFoundError as error:
        raise DamagedCheckpointError(
            f"The checkpoint {path.parent} is damaged: its file {path.name} is gone."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error


@contextmanager
def verification(name: str, num_bytes: int) -> Iterator[Advance]:
    """A progress bar where it takes long to hash so many bytes; it is told of bytes that are done."""
    is_silent = num_bytes < _SHOWN or (dist.is_initialized() and dist.get_rank() > 0)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=is_silent) as progress:
        yield partial(progress.advance, progress.add_task(f"Verifying {name}", total=num_bytes))


def identify(status: os.stat_result) -> Identity:
    """What tells whether a file is still the same."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def unreadable(path: Path, error: OSError) -> UserError:
    """What is wrong where the file itself may be whole."""
    return UserError(f"The checkpoint {path} cannot be read: {error.strerror or error}.")


def _verify(path: Path, file: BinaryIO) -> str:
    """Compare a checkpoint with its digest, and return that."""
    size = os.fstat(file.fileno()).st_size
    length = size - _COMMENT_LENGTH - len(_NO_COMMENT)
    file.seek(max(length, 0))
    tail = file.read()
    file.seek(0)
    if file.read(len(_ZIP)) != _ZIP:
        raise DamagedCheckpointError(f"{path} is empty, cut off or no checkpoint at all.")
    if not tail.startswith(_COMMENT_LENGTH.to_bytes(2, "little") + _MARK):
        raise DamagedCheckpointError(
            f"The checkpoint {path} is damaged, or was not written by a run of this program: it does not end with its "
            "digest. Give a last.ckpt or best.ckpt."
        )
    file.seek(0)
    with verification(path.name, length) as advance:
        digest = _hash(file, length, advance)
    digest.update(_NO_COMMENT)
    if tail[len(_NO_COMMENT) + len(_MARK) :] != digest.hexdigest().encode():
        raise _damaged(path)
    return digest.hexdigest()


def _hash(file: BinaryIO, length: int, advance: Advance) -> "hashlib._Hash":
    """The digest of the next bytes of a file."""
    digest, block = hashlib.sha256(), memoryview(bytearray(min(_BLOCK, max(length, 1))))
    while length > 0 and (count := file.readinto(block[:length])):  # type: ignore[attr-defined]
        digest.update(block[:count])
        length -= count
        advance(count)
    return digest


def _damaged(path: Path) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"The checkpoint {path} is damaged: its bytes are not those that were written, by their SHA-256."
    )
