"""Processes that end with the one that started them; on Linux alone, elsewhere nothing happens."""

import ctypes
import signal
import sys

_PR_SET_PDEATHSIG = 1


def end_with_parent(number: signal.Signals | None) -> None:
    """Let this process get a signal when the thread that started it ends, however that ends; None: no longer.

    See PR_SET_PDEATHSIG in prctl(2).
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, 0 if number is None else number)
