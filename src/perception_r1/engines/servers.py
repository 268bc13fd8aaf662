"""Several servers of one model: each request goes to one that answers, and those that fail are left out for a while."""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from perception_r1.engines.base import EngineError
from perception_r1.engines.client import Server, ServerLostError

_POLL_SECONDS = 1.0
"""Between two questions whether a server answers again, where none is left."""
_RETRY_SECONDS = 30.0
"""The same where others are left: a machine that is off takes ten seconds to say nothing."""
_MAX_PAUSE = 30
"""The longest pause before a request is tried again, in polls."""
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)


class Servers:
    """Servers over which requests are spread.

    Args:
        servers: The servers.
        restart_timeout: How long is waited for one where none is left, in seconds.

    Attributes:
        welcome: Is called with a server that is to take part, before it does; may raise `ServerLostError`.
    """

    def __init__(self, servers: Sequence[Server], *, restart_timeout: float) -> None:
        self.servers = list(servers)
        self.restart_timeout = restart_timeout
        self.welcome: Callable[[Server], None] = lambda server: None
        self._lock = threading.Lock()
        self._none_since: float | None = None

    def check(self) -> None:
        """Ask all of them for the first time; return once one answers.

        Raises:
            EngineError: One refuses, or none has answered for too long.
        """
        for server in self.servers:
            try:
                server.models()
            except ServerLostError as error:
                self._lose(server, error)
        self._choose(0, threading.Event())

    def renew(self) -> None:
        """Before a rollout: welcome those that answer, also those that do so again."""
        for server in self.servers:
            if server.is_lost and time.monotonic() < server.lost_at + _RETRY_SECONDS:
                continue
            if not server.is_lost or server.is_healthy():
                self._take(server)
            else:
                server.lost_at = time.monotonic()

    def complete(self, index: int, request: Callable[[Server], Any], is_over: threading.Event) -> Any:
        """The answer of one of the servers, whichever are left.

        Args:
            index: Of the request; by it a server is chosen.
            request: Asks a server; raises `ServerLostError` where it has failed.
            is_over: Once set, nobody waits for the answer any more.

        Raises:
            EngineError: No server has answered for too long, or the request is over.
        """
        num_failures, first_failure = 0, 0.0
        while True:
            server = self._choose(index, is_over)
            try:
                return request(server)
            except ServerLostError as error:
                self._lose(server, error)
            first_failure = first_failure or time.monotonic()
            num_failures += 1
            seconds = time.monotonic() - first_failure
            if num_failures > len(self.servers) and seconds >= self.restart_timeout:
                raise EngineError(f"A prompt has failed {num_failures} times in {seconds:.0f} s: {self._failures()}.")
            is_over.wait(_POLL_SECONDS * min(2 ** (num_failures - 1) - 1, _MAX_PAUSE))

    def _choose(self, index: int, is_over: threading.Event) -> Server:
        """One of the servers that answer, another for every index; waits where there is none."""
        while not is_over.is_set():
            if left := [server for server in self.servers if not server.is_lost]:
                return left[index % len(left)]
            with self._lock:
                self._wait(is_over)
        raise EngineError("The request is over.")

    def _wait(self, is_over: threading.Event) -> None:
        """Return once a server answers, or nobody waits for it any more."""
        if self._are_lost() and self._none_since is None:
            _log.warning("No server answers; they are waited for, %.0f s at most.", self.restart_timeout)
            self._none_since = time.monotonic()
        while self._are_lost() and not is_over.is_set():
            for server in self.servers:
                if server.is_healthy():
                    self._take(server)
            if self._are_lost() and self._none_since is not None:
                if time.monotonic() > self._none_since + self.restart_timeout:
                    raise EngineError(f"No server has answered for {self.restart_timeout:.0f} s: {self._failures()}.")
                is_over.wait(_POLL_SECONDS)

    def _are_lost(self) -> bool:
        return all(server.is_lost for server in self.servers)

    def _failures(self) -> str:
        return ", ".join(f"{server.url} ({server.failure})" for server in self.servers if server.failure)

    def _take(self, server: Server) -> None:
        """Let a server take part; it is lost if it cannot be welcomed."""
        try:
            self.welcome(server)
            server.is_lost, self._none_since = False, None
        except ServerLostError as error:
            self._lose(server, error)

    def _lose(self, server: Server, error: ServerLostError) -> None:
        if not server.is_lost:
            _log.warning("The server %s does not answer (%s).", server.url, error)
        server.is_lost, server.lost_at, server.failure = True, time.monotonic(), str(error)


def map_in_threads(
    function: Callable[[int, threading.Event], _Result], count: int, *, num_threads: int
) -> list[_Result]:
    """Results for the numbers below `count`, computed side by side.

    The first error, or a signal, ends it at once, whatever other threads still wait for. Unlike those of
    `concurrent.futures` they keep no process alive.

    Args:
        function: Gets a number, and an event that is set once its result is of no use any more.
        count: How many numbers.
        num_threads: Most threads.
    """
    waiting: SimpleQueue[int] = SimpleQueue()
    done: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            try:
                number = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((number, function(number, is_over), None))
            except BaseException as error:  # raised again where it is waited for
                done.put((number, None, error))

    for number in range(count):
        waiting.put(number)
    try:
        for _ in range(min(count, num_threads)):
            threading.Thread(target=work, daemon=True).start()
        results: dict[int, _Result] = {}
        while len(results) < count:
            number, result, error = done.get()
            if error is not None:
                raise error
            results[number] = result
        return [results[number] for number in range(count)]
    finally:
        is_over.set()
