"""Fixtures of the callbacks' tests."""

import io

import pytest
import rich
from rich.console import Console


@pytest.fixture
def console(monkeypatch: pytest.MonkeyPatch) -> Console:
    """The global console, writing to a string as if to a file; `console.file.getvalue()` reads it."""
    console = Console(file=io.StringIO(), width=100, force_terminal=False)
    monkeypatch.setattr(rich, "_console", console)
    return console
