"""Values of files that may be half written or edited: what is there, in the type that it must have."""

from collections.abc import Mapping
from typing import Any, TypeGuard

_TOO_MUCH = 1e30
"""Sums, squares and differences of smaller numbers stay finite."""


def mapping(value: object) -> Mapping[str, Any]:
    """A mapping, empty where it is something else."""
    return {str(key): item for key, item in value.items()} if isinstance(value, Mapping) else {}


def numbers(value: object) -> dict[str, float]:
    """The finite numbers of a mapping.

    >>> numbers({"reward": 1, "ap": None, "is_right": True})
    {'reward': 1.0}
    """
    return {name: float(item) for name, item in mapping(value).items() if is_number(item)}


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a finite number, and none with which nothing can be computed any more.

    >>> is_number(10**400), is_number(1e308), is_number(float("nan")), is_number(True), is_number(-3)
    (False, False, False, False, True)
    """
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < _TOO_MUCH


def class_name(settings: object) -> str:
    """The name of the class that settings name by its path, or nothing."""
    return str(mapping(settings).get("class_path", "")).rpartition(".")[2]


def init_args(settings: object) -> Mapping[str, Any]:
    """The arguments of the class that settings name."""
    return mapping(mapping(settings).get("init_args"))
