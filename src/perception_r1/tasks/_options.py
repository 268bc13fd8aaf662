"""Checks of the options that tasks have in common; each says in one sentence what is wrong and what would be right."""

from collections.abc import Sequence
from math import isfinite
from typing import get_args

from perception_r1.errors import UserError
from perception_r1.geometry import Matching


def check_weights(**weights: float) -> None:
    """Refuse a weight that is negative or not finite.

    Raises:
        UserError: Names the weight.

    >>> check_weights(iou_weight=0.5)
    >>> check_weights(iou_weight=-1)
    Traceback (most recent call last):
    perception_r1.errors.UserError: iou_weight must be a number from 0 on, not -1
    """
    for name, weight in weights.items():
        if not (isfinite(weight) and weight >= 0):
            raise UserError(f"{name} must be a number from 0 on, not {weight}")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse a value that is none of the choices.

    Raises:
        UserError: Names the choices.

    >>> check_choice("reward", "lines", ["similarity", "lines"])
    >>> check_choice("reward", "words", ["similarity", "lines"])
    Traceback (most recent call last):
    perception_r1.errors.UserError: reward must be one of similarity, lines, not 'words'
    """
    if value not in choices:
        raise UserError(f"{name} must be one of {', '.join(choices)}, not {value!r}")


def check_matching(matching: str) -> None:
    """Refuse an unknown way of matching.

    Raises:
        UserError: Names the known ways.

    >>> check_matching("bipartite")
    >>> check_matching("greedy")
    Traceback (most recent call last):
    perception_r1.errors.UserError: matching must be one of bipartite, sequential, not 'greedy'
    """
    check_choice("matching", matching, get_args(Matching))
