"""Fetch files by URL: several at once, each checked by its digest and there either whole or not at all.

A file is written under another name in its folder and renamed once its digest is right; so a fetch that was killed
leaves no half file, and the next one fetches only what is missing. One fetch at a time is at work in a folder.
"""

import hashlib
import json
import re
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from threading import Event
from urllib import request
from urllib.error import HTTPError
from urllib.parse import quote

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from perception_r1 import __version__
from perception_r1.data.sources.base import SHA256, Download
from perception_r1.errors import UserError
from perception_r1.locks import locked

FAILURES = "failures.jsonl"
"""File beside the fetched ones that tells which could not be had, one a line: url, sha256, reason."""

LOCK = ".fetch.lock"
"""File beside the fetched ones that is locked while a fetch is at work."""

_DRAFT = ".part"
"""How the names of unfinished files end; they begin with a dot."""
_URL = re.compile(r"https?://[^/]", re.IGNORECASE)
_URL_MARKS = "%/:=&?~#+!$,;'@()*[]"
"""What is not escaped in a URL besides letters and digits; some lists have spaces and accents in theirs."""
_HEADERS = {"User-Agent": f"perception-r1/{__version__}"}
_CHUNK = 1 << 16
_PATIENCE = 10
"""Timeouts that one attempt may take in all: a server that trickles would otherwise hold a thread for hours."""
_PASSING = frozenset((408, 425, 429))
"""HTTP statuses besides 5xx after which it is worth trying again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FetchReport:
    """What became of the files, each counted once.

    Attributes:
        num_fetched: Fetched now.
        num_present: There already.
        num_failed: Could not be had; `failures.jsonl` says why.
    """

    num_fetched: int
    num_present: int
    num_failed: int

    def __str__(self) -> str:
        told = f" ({FAILURES} says why)" if self.num_failed else ""
        return f"{self.num_fetched} fetched, {self.num_present} already there, {self.num_failed} failed{told}"


def fetch(
    downloads: Iterable[Download],
    *,
    num_threads: int = 16,
    timeout: float = 30.0,
    num_attempts: int = 3,
    pause: float = 1.0,
    max_bytes: int = 50_000_000,
) -> FetchReport:
    """Fetch what is not there yet; a file that cannot be had is written down, and the others go on.

    Args:
        downloads: What to fetch; of several for the same path the first counts.
        num_threads: Files fetched at once.
        timeout: Seconds without a byte after which an attempt is given up.
        num_attempts: Attempts at a file, as long as it fails for reasons that may pass.
        pause: Seconds before the second attempt, twice as many before each further one.
        max_bytes: Bytes of the largest file that is accepted.

    Raises:
        UserError: A number is out of range, a folder cannot be written to, or another fetch is at work there.
    """
    for name, value in {"num_threads": num_threads, "num_attempts": num_attempts, "max_bytes": max_bytes}.items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if not timeout > 0 or not pause >= 0:
        raise UserError(f"timeout must be positive and pause not negative, got {timeout} and {pause}")
    wanted: dict[Path, Download] = {}
    for download in downloads:
        wanted.setdefault(download.path, download)
    folders = {path.parent for path in wanted}
    fetcher = _Fetcher(timeout=timeout, num_attempts=num_attempts, pause=pause, max_bytes=max_bytes)
    with ExitStack() as stack:
        for folder in folders:
            stack.enter_context(_alone(folder))
        report, reasons = _fetch_all(fetcher, wanted, num_threads)
        for folder in folders:
            _write_failures(folder, [(wanted[path], reasons[path]) for path in reasons if path.parent == folder])
    return report


def _fetch_all(
    fetcher: "_Fetcher", wanted: Mapping[Path, Download], num_threads: int
) -> tuple[FetchReport, dict[Path, str]]:
    """Fetch in threads, with a progress bar; also the reasons of failures, in the order of the files."""
    counts, reasons = Counter(num_fetched=0, num_present=0, num_failed=0), {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[told]}"))
    pool = ThreadPoolExecutor(max_workers=num_threads)
    try:
        futures = {pool.submit(fetcher.fetch, download): path for path, download in wanted.items()}
        with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
            bar = progress.add_task("Fetching", total=len(futures), told=str(FetchReport(**counts)))
            for future in as_completed(futures):
                outcome, reason = future.result()
                counts[f"num_{outcome}"] += 1
                if outcome == "failed":
                    reasons[futures[future]] = reason
                progress.update(bar, advance=1, told=str(FetchReport(**counts)))
    finally:
        fetcher.stop.set()
        pool.shutdown(cancel_futures=True)
    return FetchReport(**counts), {path: reasons[path] for path in wanted if path in reasons}


class _Failure(Exception):
    """A file could not be had.

    Attributes:
        is_passing: Another attempt may do better.
    """

    def __init__(self, reason: object, *, is_passing: bool) -> None:
        super().__init__(" ".join(str(reason).split()) or type(reason).__name__)
        self.is_passing = is_passing


@dataclass(kw_only=True)
class _Fetcher:
    """Fetches one file at a time, in as many threads as there are callers; for the settings see `fetch`.

    Attributes:
        stop: Ends attempts and pauses early, since nobody waits for their results any more.
    """

    timeout: float
    num_attempts: int
    pause: float
    max_bytes: int
    opener: request.OpenerDirector = field(default_factory=lambda: _opener())
    stop: Event = field(default_factory=Event)

    def fetch(self, download: Download) -> tuple[str, str]:
        """The outcome ("fetched", "present" or "failed") and why it failed.

        Raises:
            UserError: The file cannot be written.
        """
        if not SHA256.fullmatch(download.sha256):
            return "failed", "sha256: must be 64 hex digits"
        if not _URL.match(download.url):
            return "failed", "url: must begin with http:// or https:// and a host"
        if download.path.exists():
            return "present", ""
        pause = self.pause
        for attempt in range(1, self.num_attempts + 1):
            try:
                self._try(download)
                break
            except _Failure as failure:
                if attempt == self.num_attempts or not failure.is_passing or self.stop.wait(pause):
                    return "failed", str(failure)
            pause *= 2
        return "fetched", ""

    def _try(self, download: Download) -> None:
        """Fetch and check a file once.

        Raises:
            _Failure: It could not be had.
            UserError: It cannot be written.
        """
        draft = download.path.with_name(f".{download.path.name}.{uuid.uuid4().hex}{_DRAFT}")
        try:
            address = request.Request(quote(download.url, safe=_URL_MARKS), headers=_HEADERS)
            with self.opener.open(address, timeout=self.timeout) as response:
                digest = _write(draft, self._chunks(response))
            if digest != download.sha256:
                raise _Failure(f"the content is another: its SHA-256 is {digest}", is_passing=False)
            with _local(download.path):
                draft.replace(download.path)
        except UserError:
            raise
        except HTTPError as error:
            is_passing = error.code >= 500 or error.code in _PASSING
            raise _Failure(f"HTTP status {error.code}: {error.reason}", is_passing=is_passing) from error
        except (OSError, HTTPException) as error:
            raise _Failure(error, is_passing=True) from error
        except ValueError as error:
            raise _Failure(f"url: {error}", is_passing=False) from error
        finally:
            draft.unlink(missing_ok=True)

    def _chunks(self, response: HTTPResponse) -> Iterator[bytes]:
        """The body.

        Raises:
            _Failure: It is too large or too slow, or breaks off.
        """
        header = response.headers.get("Content-Length", "")
        length = int(header) if header.isdecimal() and not response.chunked else None
        end = time.monotonic() + _PATIENCE * self.timeout
        size = 0
        while length is None or size < length:
            if max(size, length or 0) > self.max_bytes:
                raise _Failure(f"is larger than {self.max_bytes} bytes", is_passing=False)
            if time.monotonic() > end or self.stop.is_set():
                raise _Failure(f"is not there after {_PATIENCE * self.timeout:g} seconds", is_passing=False)
            chunk = response.read1(_CHUNK if length is None else min(_CHUNK, length - size))
            if not chunk:
                break
            size += len(chunk)
            yield chunk
        if length is not None and size < length:
            raise _Failure(f"broke off after {size} of {length} bytes", is_passing=True)


def _opener() -> request.OpenerDirector:
    """Knows http and https, proxies and redirects, and nothing else: no files, no FTP, no data in the URL."""
    opener = request.OpenerDirector()
    for protocol in (request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler):
        opener.add_handler(protocol())
    for rule in (request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor):
        opener.add_handler(rule())
    return opener


def _write(path: Path, chunks: Iterator[bytes]) -> str:
    """Write a file; the hex digest of its content."""
    digest = hashlib.sha256()
    with _local(path):
        file = path.open("xb")
    with file:
        for chunk in chunks:
            digest.update(chunk)
            with _local(path):
                file.write(chunk)
        with _local(path):
            file.flush()
    return digest.hexdigest()


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder, keep other fetches out of it, and remove what one that was killed has left there.

    Raises:
        UserError: It cannot be written to, or another fetch is at work there.
    """
    with _local(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with locked(folder, "another fetch", name=LOCK):
        with _local(folder):
            for draft in folder.glob(f".*{_DRAFT}"):
                draft.unlink(missing_ok=True)
        yield


def _write_failures(folder: Path, failures: Sequence[tuple[Download, str]]) -> None:
    """Write down what could not be had; no file where there is nothing to tell."""
    path = folder / FAILURES
    rows = [{"url": download.url, "sha256": download.sha256, "reason": reason} for download, reason in failures]
    with _local(path):
        if rows:
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        else:
            path.unlink(missing_ok=True)


@contextmanager
def _local(path: Path) -> Iterator[None]:
    """Tell trouble with the own disk from trouble with the network."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from error
