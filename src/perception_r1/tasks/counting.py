"""Counting: a box around every object of one kind. Reward = format * ratio of the counts * closeness of the points."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod, sqrt
from typing import Any, Literal

import numpy as np

from perception_r1.codecs import Codec, ParsedBoxes
from perception_r1.data.module import TaskDataModule
from perception_r1.data.synthetic.objects import CountingWorld
from perception_r1.errors import UserError
from perception_r1.geometry import (
    IOU_THRESHOLDS,
    Matching,
    best_share,
    center,
    fbeta,
    iou_matrix,
    match,
    point_distances,
    threshold_shares,
    to_pixels,
)
from perception_r1.published import count_boxes
from perception_r1.records import Box, ImageSize, LabelledBox, Overlay, Point, Sample, Score
from perception_r1.rows import Row, RowError
from perception_r1.task import Task
from perception_r1.tasks._options import check_beta, check_choice, check_matching

_HALF_SIDE = 0.02
"""Half the side of the square that stands for a point, in fractions of the image."""
_DISTANCES = np.arange(1, 11) / 100
"""Of a center from its point, in fractions of the diagonal; the public code takes the sides of the image as 1."""
_LEAST_HALF_SIDE = 0.002
"""Near an edge the square shrinks to keep its center on the point, but no further than this, to remain a box."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingTarget:
    """How many objects there are and, where the data tells, where they are.

    Attributes:
        count: Number of objects.
        points: A point on each object, or None where only the number is known.
        boxes: A box around each object, or None; its centers are then the points.
    """

    count: int
    points: tuple[Point, ...] | None = None
    boxes: tuple[Box, ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CountingPrediction:
    """The objects that an answer lists.

    Attributes:
        count: Number of boxes listed, invalid ones included.
        boxes: The valid ones.
        label: The name that the answer gives to its first box, or nothing.
        is_well_formed: The whole answer is one label followed by one or more boxes, all of them valid; or it is empty.
    """

    count: int
    boxes: tuple[Box, ...]
    label: str
    is_well_formed: bool


@dataclass(frozen=True, kw_only=True)
class Counting(Task[CountingTarget, CountingPrediction]):
    """Output a box around every object of one kind.

    Reward = format * ratio * closeness.

    - format: the whole answer is one label followed by one or more valid boxes.
    - ratio: min(n, m) / max(n, m) for n boxes listed and m objects; 0 when there are none of one of them.
    - closeness: 1 - mean distance between the centers of boxes and their points / sqrt(2), with both sides of the image
      taken as 1; it is 1 where the data gives a count without points.

    With `reward` mean_f1 the reward is the metric of that name, from 0 to 1, for a well-formed answer, and 0 for any
    other: the mean of F1, over COCO's IoU thresholds, of boxes that meet objects one to one; where the data has points,
    over distances of the centers of up to a tenth of the diagonal; where it has a number alone, of the numbers. With
    `beta` it is F-beta.

    Where there is nothing to count, the empty answer of the model family is the right one, and all three are 1; the
    paper has no such images.

    >>> task, target = Counting(), CountingTarget(count=2, points=((0.25, 0.25), (0.75, 0.75)))
    >>> boxes = ((0.5, 0.5, 1.0, 1.0), (0.0, 0.0, 0.5, 0.5))
    >>> task.score(CountingPrediction(count=2, boxes=boxes, label="cup", is_well_formed=True), target).reward
    1.0
    >>> Counting(matching="sequential").score(
    ...     CountingPrediction(count=2, boxes=boxes, label="cup", is_well_formed=True), target).reward
    0.5
    >>> task.score(CountingPrediction(count=2, boxes=boxes, label="cup", is_well_formed=False), target).reward
    0.0
    >>> task.score(None, target).reward
    0.0
    >>> nothing = CountingPrediction(count=0, boxes=(), label="", is_well_formed=True)
    >>> task.score(nothing, CountingTarget(count=0)).reward, task.score(nothing, target).reward
    (1.0, 0.0)

    Attributes:
        reward: That of Perception-R1, or "mean_f1".
        matching: How boxes meet points: "bipartite" for the least total distance, "sequential" for the k-th box with
            the k-th point.
        beta: In the reward mean_f1, objects that are missing weigh beta^2 times as much as boxes that are wrong.
    """

    prompt_template: str = "Output all the bounding boxes of the {query}"
    reward: Literal["perception_r1", "mean_f1"] = "perception_r1"
    matching: Matching = "bipartite"
    beta: float = 1.0

    name = "counting"
    component_names = ("format", "ratio", "closeness")
    metric_names = ("count_accuracy", "mean_f1", "absolute_error", "count", "false_positives", "false_negatives")
    primary_metric = "count_accuracy"
    published_metric_names = ("count_accuracy",)
    row_keys = ("label", "points", "count", "boxes")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_matching(self.matching)
        check_choice("reward", self.reward, ("perception_r1", "mean_f1"))
        check_beta(self.beta, self.reward)

    def read_row(self, row: Row) -> tuple[str, CountingTarget]:
        """The kind of "label"; points from "boxes" or "points", the number from them or from "count"."""
        label = row.text("label")
        boxes = row.boxes("boxes") if "boxes" in row else None
        points = row.points("points") if "points" in row else None
        numbers = {
            "boxes": None if boxes is None else len(boxes),
            "points": None if points is None else len(points),
            "count": row.integer("count", minimum=0) if "count" in row else None,
        }
        known = {key: number for key, number in numbers.items() if number is not None}
        if not known:
            raise RowError("points: is missing, the row needs points, boxes or a count")
        if len(set(known.values())) > 1:
            told = ", ".join(f"{key} gives {number}" for key, number in known.items())
            raise RowError(f"{next(iter(known))}: must tell the same number of objects as all the row, but {told}")
        if boxes is not None:
            points = tuple(center(box) for box in boxes)
        return label, CountingTarget(count=next(iter(known.values())), points=points, boxes=boxes)

    def format_target(self, sample: Sample[CountingTarget], codec: Codec, image_size: ImageSize) -> str:
        """The boxes, or small squares centered on the points, each labelled with the kind.

        Raises:
            UserError: The sample gives neither boxes nor points.
        """
        boxes, points = sample.target.boxes, sample.target.points
        if boxes is None:
            if points is None:
                raise UserError(f"sample {sample.id}: an answer to learn from needs points or boxes, not a count alone")
            boxes = tuple(_square(point) for point in points)
        return codec.format_boxes([LabelledBox(label=sample.query, box=box) for box in boxes], image_size)

    def parse_answer(self, text: str, codec: Codec, image_size: ImageSize) -> CountingPrediction | None:
        """Every box of the text; None when it lists nothing, and is not the way to say that there is nothing either."""
        return self.read_boxes(codec.parse_boxes(text, image_size))

    def read_boxes(self, parsed: ParsedBoxes) -> CountingPrediction | None:
        """All boxes, and whether they are well-formed."""
        if not parsed.items:
            return CountingPrediction(count=0, boxes=(), label="", is_well_formed=True) if parsed.is_exact else None
        count, label = len(parsed.items), parsed.items[0].label
        boxes = tuple(item.box for item in parsed.items if item.box is not None)
        has_one_label = label is not None and all(item.label == label for item in parsed.items)
        is_well_formed = parsed.is_exact and len(boxes) == count and has_one_label
        return CountingPrediction(count=count, boxes=boxes, label=label or "", is_well_formed=is_well_formed)

    def parse_published(self, text: str, codec: Codec, image_size: ImageSize) -> CountingPrediction | None:
        """The number of boxes between box tokens, in any form and whatever is around them; None without any."""
        count = count_boxes(text)
        return CountingPrediction(count=count, boxes=(), label="", is_well_formed=True) if count else None

    def score(self, prediction: CountingPrediction | None, target: CountingTarget) -> Score:
        """Format, ratio and closeness; a count is right only in a well-formed answer."""
        count = prediction.count if prediction is not None else 0
        is_well_formed = prediction is not None and prediction.is_well_formed and (count > 0 or target.count == 0)
        if is_well_formed and target.count == count == 0:
            components = dict.fromkeys(self.component_names, 1.0)
        else:
            components = {
                "format": float(is_well_formed),
                "ratio": min(count, target.count) / max(count, target.count) if count and target.count else 0.0,
                "closeness": self._closeness(prediction.boxes, target) if prediction is not None else 0.0,
            }
        answer = prediction if is_well_formed else None
        mean_f1 = _mean_fbeta(answer, target)
        metrics = {
            "count_accuracy": float(is_well_formed and count == target.count),
            "mean_f1": mean_f1,
            "absolute_error": float(abs(count - target.count)),
            "count": float(count),
            "false_positives": float(max(count - target.count, 0)),
            "false_negatives": float(max(target.count - count, 0)),
        }
        reward = prod(components.values())
        if self.reward == "mean_f1":
            reward = mean_f1 if self.beta == 1 else _mean_fbeta(answer, target, self.beta)
        return Score(reward=reward, components=components, metrics=metrics)

    def num_objects(self, target: CountingTarget) -> int:
        """Their true number."""
        return target.count

    def overlays(self, answer: CountingTarget | CountingPrediction) -> Sequence[Overlay]:
        """Boxes where they are known, points otherwise."""
        if isinstance(answer, CountingPrediction):
            return [Overlay(shape=box, caption=answer.label) for box in answer.boxes]
        return [Overlay(shape=shape) for shape in answer.boxes or answer.points or ()]

    def describe(self, answer: CountingTarget | CountingPrediction) -> str:
        """The number of objects."""
        return f"{answer.count or 'no'} object{'' if answer.count == 1 else 's'}"

    def serialize_prediction(
        self, prediction: CountingPrediction | None, image_size: ImageSize
    ) -> dict[str, object] | None:
        """`{"count": n, "boxes": [[x1, y1, x2, y2], ...]}`, the valid boxes in pixels of the original image."""
        if prediction is None:
            return None
        return {"count": prediction.count, "boxes": [to_pixels(box, image_size) for box in prediction.boxes]}

    def _closeness(self, boxes: Sequence[Box], target: CountingTarget) -> float:
        """1 - mean distance of the matched centers and points, over the diagonal; 0 with nothing to match."""
        if not boxes or not target.count:
            return 0.0
        if target.points is None:
            return 1.0
        distances = point_distances([center(box) for box in boxes], target.points)
        pairs = match(distances, self.matching)
        return 1.0 - sum(float(distances[pair]) for pair in pairs) / len(pairs) / sqrt(2)


def _mean_fbeta(prediction: CountingPrediction | None, target: CountingTarget, beta: float = 1) -> float:
    """Of a well-formed answer; 0 without one."""
    if prediction is None:
        return 0.0
    if target.boxes is not None:
        num_right = best_share(threshold_shares(iou_matrix(prediction.boxes, target.boxes), IOU_THRESHOLDS))
    elif target.points is not None:
        centers = [center(box) for box in prediction.boxes]
        num_right = best_share(threshold_shares(-point_distances(centers, target.points) / sqrt(2), -_DISTANCES))
    else:
        num_right = min(prediction.count, target.count)
    return fbeta(num_right, prediction.count, target.count, beta)


def _square(point: Point) -> Box:
    """A small box centered on a point, inside the image; within a hair of the edge it may be off by a thousandth."""
    x, y = point
    half = max(min(_HALF_SIDE, x, 1 - x, y, 1 - y), _LEAST_HALF_SIDE)
    return max(x - half, 0.0), max(y - half, 0.0), min(x + half, 1.0), min(y + half, 1.0)


class CountingData(TaskDataModule):
    """Images with the objects of one kind, as points or as a number."""

    def __init__(self, task: Counting = Counting(), world: CountingWorld = CountingWorld(), **kwargs: Any) -> None:  # noqa: B008 - frozen
        super().__init__(task, world, **kwargs)
