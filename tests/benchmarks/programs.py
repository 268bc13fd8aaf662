"""The programs of benchmarks/ as modules; their folder is on the path only while one of them is imported or runs."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results"


def program(name: str) -> ModuleType:
    """A module of benchmarks/ under its own name, with those that it imports."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(BENCHMARKS))
