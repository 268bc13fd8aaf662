"""A web server on this machine that hands out the files of a folder, slowly."""

import http.server
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

_PAUSE = 0.02
"""Seconds between two pieces of a file."""
_NUM_PIECES = 4


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        """Write a file piece by piece; whoever asked may be gone meanwhile."""
        data = source.read()
        size = max(1, len(data) // _NUM_PIECES)
        try:
            for start in range(0, len(data), size):
                outputfile.write(data[start : start + size])
                outputfile.flush()
                time.sleep(_PAUSE)
        except (BrokenPipeError, ConnectionResetError):
            pass


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """The address of a server, while it is at work."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, directory=str(folder))) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
