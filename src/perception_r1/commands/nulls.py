"""Settings that are null and must not be: the parser takes null for any option of a class, whatever its type."""

import inspect
from pkgutil import resolve_name
from typing import Any, get_args, get_type_hints

from jsonargparse import Namespace

from perception_r1.errors import UserError

_LINKED = ("model.task",)
"""Options that no user gives: they are filled in when the data module is there."""


def check_nulls(name: str, value: Any) -> None:
    """Refuse null where a class cannot take it.

    Args:
        name: Of the setting on the command line.
        value: A class with its options, a list or a mapping of such, or anything else.

    Raises:
        UserError: Names the option.
    """
    if isinstance(value, list):
        for item in value:
            check_nulls(name, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            check_nulls(f"{name}.{key}", item)
    elif isinstance(value, Namespace):
        types = _types(value.class_path) if "init_args" in value else {}
        for key, item in vars(value.get("init_args", value)).items():
            option, kind = f"{name}.{key}", types.get(key, Any)
            is_optional = kind is Any or type(None) in get_args(kind) or option in _LINKED
            if item is None and not is_optional:
                raise UserError(f"--{option} must not be null")
            check_nulls(option, item)


def _types(path: str) -> dict[str, Any]:
    """Types of a class's options, those of its bases among them, but for those that are null unless given.

    Types that are not known outside of a type checker count as none.
    """
    found: dict[str, Any] = {}
    for base in reversed(inspect.getmro(resolve_name(path))[:-1]):
        if constructor := vars(base).get("__init__"):
            try:
                types = get_type_hints(constructor)
            except NameError:
                continue
            options = inspect.signature(constructor).parameters.values()
            found |= {
                each.name: types[each.name] for each in options if each.name in types and each.default is not None
            }
    return found
