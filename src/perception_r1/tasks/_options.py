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


def check_beta(beta: float, reward: str) -> None:
    """Refuse a beta that is not above 0, or where the reward is no F-beta.

    Raises:
        UserError: Says so.

    >>> check_beta(2.0, "mean_f1")
    >>> check_beta(2.0, "perception_r1")
    Traceback (most recent call last):
    perception_r1.errors.UserError: beta belongs to the reward mean_f1
    """
    if not (isfinite(beta) and beta > 0):
        raise UserError(f"beta must be a number above 0, not {beta}")
    if beta != 1 and reward != "mean_f1":
        raise UserError("beta belongs to the reward mean_f1")


def check_iou_thresholds(iou_threshold: float, final_iou_threshold: float | None) -> None:
    """Refuse thresholds outside of 0..1.

    Raises:
        UserError: Names the threshold.

    >>> check_iou_thresholds(0.5, 0.9)
    >>> check_iou_thresholds(0.5, 90)
    Traceback (most recent call last):
    perception_r1.errors.UserError: final_iou_threshold must lie in 0..1, not 90
    """
    for name, value in {"iou_threshold": iou_threshold, "final_iou_threshold": final_iou_threshold}.items():
        if value is not None and not 0 <= value <= 1:
            raise UserError(f"{name} must lie in 0..1, not {value}")


def threshold_at(progress: float, first: float, final: float | None) -> float:
    """A threshold that goes evenly from its first to its final value; None: it stays.

    >>> threshold_at(0.5, 0.5, 0.9), threshold_at(0.5, 0.5, None)
    (0.7, 0.5)
    """
    return first if final is None else first + progress * (final - first)


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
