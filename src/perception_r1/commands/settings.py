"""Which settings of a run differ from the defaults of the signatures."""

import importlib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any

from perception_r1.errors import UserError


def deviations(node: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Settings that differ from their defaults, by name, and those that have none; a class goes by its own signature.

    Args:
        node: Settings as `config.yaml` has them.
        defaults: Default of each of them that has one.
        prefix: Before the names.

    Raises:
        UserError: A class that the settings name is not there.

    >>> dict(deviations({"lr": 0.1, "betas": [0.9, 0.99], "sizes": {"width": 3}}, {"betas": (0.9, 0.99)}))
    {'lr': 0.1, 'sizes.width': 3}
    """
    for name, value in node.items():
        default = defaults.get(name, inspect.Parameter.empty)
        if isinstance(value, Mapping) and "class_path" in value:
            yield f"{prefix}{name}", value["class_path"].rpartition(".")[2]
            yield from deviations(value.get("init_args", {}), class_defaults(value["class_path"]), f"{prefix}{name}.")
        elif isinstance(value, Mapping):
            own = asdict(default) if is_dataclass(default) and not isinstance(default, type) else {}
            yield from deviations(value, own, f"{prefix}{name}.")
        elif value != (list(default) if isinstance(default, tuple) else default):
            yield f"{prefix}{name}", value


def class_defaults(class_path: str) -> dict[str, Any]:
    """Defaults of the arguments of a class, those that it hands on to its bases included.

    Raises:
        UserError: There is no such class.
    """
    module, _, name = class_path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"there is no class {class_path}, which config.yaml names") from error
    signatures = [inspect.signature(base) for base in reversed(inspect.getmro(kind)) if base is not object]
    parameters = [parameter for signature in signatures for parameter in signature.parameters.values()]
    return {each.name: each.default for each in parameters if each.default is not each.empty}
