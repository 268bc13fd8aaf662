"""Boxes, their overlap, and the matching of predictions with targets: pure functions that every task shares.

Boxes are xyxy and points xy, in fractions of the image (see `records.py`). A box here has a positive area: codecs and
row readers let no other one through.

Legend: N predictions (the first argument), M targets (the second).
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from perception_r1.records import Box, ImageSize, Point

Floats = NDArray[np.float64]
IOU_THRESHOLDS: Floats = np.arange(50, 100, 5) / 100
"""COCO's: 0.50, 0.55, ..., 0.95."""
_ROUNDING = 1e-9
"""A value that misses a threshold by no more than rounding reaches it."""
Matching = Literal["bipartite", "sequential"]
"""How predictions meet targets: by least total cost, or the k-th with the k-th (the paper's ablation)."""


def center(box: Box) -> Point:
    """The middle of a box.

    >>> center((0.0, 0.0, 0.5, 1.0))
    (0.25, 0.5)
    """
    x1, y1, x2, y2 = box
    return (x1 + x2) / 2, (y1 + y2) / 2


def iou(first: Box, second: Box) -> float:
    """Intersection over union of two boxes, 0..1.

    >>> iou((0.0, 0.0, 0.5, 0.5), (0.0, 0.0, 0.5, 1.0))
    0.5
    >>> iou((0.0, 0.0, 0.5, 0.5), (0.5, 0.0, 1.0, 0.5))  # a shared edge is no overlap
    0.0
    """
    return float(iou_matrix([first], [second])[0, 0])


def iou_matrix(first: Sequence[Box], second: Sequence[Box]) -> Floats:
    """Intersection over union of every pair, 0..1, as [N, M]."""
    intersection, union, _ = _areas(first, second)
    return intersection / union


def giou_matrix(first: Sequence[Box], second: Sequence[Box]) -> Floats:
    """Generalised IoU (Rezatofighi et al. 2019) of every pair: IoU less the empty share of the box around both.

    [N, M], each entry in -1..1.
    """
    intersection, union, hull = _areas(first, second)
    return intersection / union - (hull - union) / hull


def size_distances(first: Sequence[Box], second: Sequence[Box]) -> Floats:
    """L1 distance of every pair's (center x, center y, width, height), as [N, M]."""
    return np.asarray(cdist(_cxcywh(first), _cxcywh(second), "cityblock"), np.float64)


def point_distances(first: Sequence[Point], second: Sequence[Point]) -> Floats:
    """Euclidean distance of every pair, in fractions of the image's sides, as [N, M]."""
    return np.asarray(cdist(_array(first, 2), _array(second, 2)), np.float64)


def match(cost: Floats, mode: Matching) -> list[tuple[int, int]]:
    """Pairs (prediction, target); min(N, M) of them, in the order of the predictions.

    Args:
        cost: [N, M], finite.
        mode: "bipartite" for the assignment of least total cost, "sequential" for the k-th with the k-th.

    >>> cost = np.array([[1.0, 0.0], [0.0, 1.0]])
    >>> match(cost, "bipartite")
    [(0, 1), (1, 0)]
    >>> match(cost, "sequential")
    [(0, 0), (1, 1)]
    >>> match(np.zeros((3, 0)), "bipartite")
    []
    """
    if mode == "sequential":
        return [(k, k) for k in range(min(cost.shape))]
    rows, columns = linear_sum_assignment(cost)
    return [(int(row), int(column)) for row, column in zip(rows, columns, strict=True)]


def threshold_shares(values: Floats, thresholds: Floats) -> Floats:
    """Which share of the thresholds each value reaches, in the shape of the values.

    >>> threshold_shares(np.array([0.2, 0.5, 1.0]), np.array([0.25, 0.5])).tolist()
    [0.0, 1.0, 1.0]
    """
    return np.asarray((values[..., None] >= thresholds - _ROUNDING).mean(axis=-1), np.float64)


def best_share(shares: Floats) -> float:
    """The most that predictions and targets can share when they meet one to one.

    Args:
        shares: [N, M], for each pair how much of it is right, in 0..1.

    >>> best_share(np.array([[1.0, 0.5], [0.5, 0.0]]))
    1.0
    """
    return sum(float(shares[pair]) for pair in match(-shares, "bipartite"))


def fbeta(num_right: float, num_predicted: int, num_targets: int, beta: float = 1.0) -> float:
    """F-beta of predictions and targets; 1 when there are none of either.

    Args:
        num_right: Pairs that are right. With a `best_share` of `threshold_shares` in their place, it is the mean of
            F-beta over the thresholds for this one matching.
        num_predicted: All predictions, also those that cannot be right.
        num_targets: All targets.
        beta: Recall weighs beta times as much as precision.

    >>> fbeta(1.0, 3, 2)
    0.4
    """
    if not num_predicted and not num_targets:
        return 1.0
    return (1 + beta**2) * num_right / (num_predicted + beta**2 * num_targets)


def to_pixels(box: Box, image_size: ImageSize) -> list[float]:
    """A box in pixels of the original image, to two decimals, for people and files.

    >>> to_pixels((0.1, 0.5, 1.0, 1.0), ImageSize(width=333, height=100, resized_width=336, resized_height=112))
    [33.3, 50.0, 333.0, 100.0]
    """
    sides = (image_size.width, image_size.height, image_size.width, image_size.height)
    return [round(value * side, 2) for value, side in zip(box, sides, strict=True)]


def _areas(first: Sequence[Box], second: Sequence[Box]) -> tuple[Floats, Floats, Floats]:
    """Areas of intersection, union and hull of every pair, each [N, M]."""
    a, b = _array(first, 4)[:, None], _array(second, 4)[None]  # [N, 1, 4], [1, M, 4]
    overlap = np.minimum(a[..., 2:], b[..., 2:]) - np.maximum(a[..., :2], b[..., :2])
    span = np.maximum(a[..., 2:], b[..., 2:]) - np.minimum(a[..., :2], b[..., :2])
    intersection = overlap.clip(min=0).prod(axis=-1)
    own = (a[..., 2:] - a[..., :2]).prod(axis=-1) + (b[..., 2:] - b[..., :2]).prod(axis=-1)
    return intersection, own - intersection, span.prod(axis=-1)


def _cxcywh(boxes: Sequence[Box]) -> Floats:
    """Center and size of each box, [N, 4]."""
    corners = _array(boxes, 4)
    return np.concatenate([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], axis=1)


def _array(items: Sequence[Box] | Sequence[Point], width: int) -> Floats:
    """Boxes as [N, 4] or points as [N, 2], also when there are none."""
    return np.asarray(items, dtype=np.float64).reshape(-1, width)
