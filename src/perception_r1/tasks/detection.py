"""Detection: a labelled box for every object. Reward = format + F1 + class + IoU, weighted, less what is missing."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from torchmetrics import Metric

from perception_r1.codecs import Codec, ParsedBoxes
from perception_r1.data.categories import COCO_NAMES
from perception_r1.data.module import TaskDataModule
from perception_r1.data.synthetic.objects import DetectionWorld
from perception_r1.errors import UserError
from perception_r1.geometry import (
    IOU_THRESHOLDS,
    Matching,
    best_share,
    fbeta,
    giou_matrix,
    iou_matrix,
    match,
    size_distances,
    threshold_shares,
    to_pixels,
)
from perception_r1.metrics import BoxAP
from perception_r1.published import json_boxes
from perception_r1.records import Box, ImageSize, LabelledBox, Overlay, Sample, Score
from perception_r1.rows import Row, RowError
from perception_r1.task import Task
from perception_r1.tasks._options import (
    check_beta,
    check_choice,
    check_iou_thresholds,
    check_matching,
    check_weights,
    threshold_at,
)

_SIZE_COST, _LABEL_COST, _OVERLAP_COST = 5.0, 1.0, 2.0
"""Weights of L1 distance, equal labels and GIoU in the cost of a match (DETR's, which the paper takes over)."""

_TINY = 1e-9
"""Side of a box that has none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionTarget:
    """Every object of the image; may be none.

    Attributes:
        objects: Their names and boxes.
        areas: Area of each object's outline in pixels squared of the original image, None for that of its box; or
            nothing at all.
        crowds: Regions of many objects. They are no targets; average precision counts no detection in them.
    """

    objects: tuple[LabelledBox, ...]
    areas: tuple[float | None, ...] = ()
    crowds: tuple[LabelledBox, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class DetectionPrediction:
    """The objects that an answer lists.

    Attributes:
        objects: The valid ones: a known label and a valid box.
        num_listed: Number of entries listed, invalid ones included.
        is_exact: The whole answer is a list in the codec's form.
    """

    objects: tuple[LabelledBox, ...]
    num_listed: int
    is_exact: bool


@dataclass(frozen=True, kw_only=True)
class Detection(Task[DetectionTarget, DetectionPrediction]):
    """Output a labelled box for every object of the categories.

    Reward = format_weight * format + f1_weight * F1 + class_weight * class + iou_weight * IoU - missing_weight *
    missing, at least 0 and at most the sum of the four weights (3 by default). Valid objects meet targets by least
    total cost; a pair stands when its IoU is greater than iou_threshold (0.5).

    - format: share of the listed entries that are valid; 0 when there is text around the list.
    - F1: of the pairs among the valid objects (precision) and among the targets (recall), whatever the labels.
    - class: share of the pairs whose labels agree.
    - IoU: mean over the pairs.
    - missing: share of the targets without a pair.

    On an image without objects an empty list gets full marks.

    With `reward` mean_f1 the reward is the metric of that name, from 0 to 1, for an answer that is nothing but a list,
    and 0 for any other: the mean of F1 over COCO's IoU thresholds, for boxes that meet targets of their own name one to
    one. Whatever is listed besides counts as wrong, whether it is valid or not. With `beta` it is F-beta.

    >>> task = Detection(categories=("cat", "dog"))
    >>> cat = LabelledBox(label="cat", box=(0.0, 0.0, 0.5, 0.5))
    >>> dog = LabelledBox(label="dog", box=(0.5, 0.5, 1.0, 1.0))
    >>> target = DetectionTarget(objects=(cat, dog))
    >>> task.score(DetectionPrediction(objects=(dog, cat), num_listed=2, is_exact=True), target).reward
    3.0
    >>> score = task.score(DetectionPrediction(objects=(cat,), num_listed=2, is_exact=True), target)
    >>> {name: round(value, 2) for name, value in score.components.items()}
    {'format': 0.5, 'f1': 0.67, 'class': 1.0, 'iou': 1.0, 'missing': 0.5}
    >>> empty = DetectionPrediction(objects=(), num_listed=0, is_exact=True)
    >>> task.score(empty, DetectionTarget(objects=())).reward
    3.0
    >>> task.score(None, DetectionTarget(objects=())).reward
    0.0

    Attributes:
        reward: That of Perception-R1, or "mean_f1".
        categories: Names of the known categories; the 80 of COCO unless given.
        matching: How predictions meet targets: "bipartite" for the least total cost, "sequential" for the k-th with the
            k-th.
        format_weight: Weight of the share of listed entries that are valid.
        f1_weight: Weight of F1.
        class_weight: Weight of the share of pairs with the right label.
        iou_weight: Weight of the pairs' mean IoU.
        missing_weight: Penalty for the share of targets that have no pair; 0 turns it off.
        iou_threshold: A matched pair stands when its IoU is greater than this.
        final_iou_threshold: In training `iou_threshold` goes evenly to this, as in Vision-R1 (arXiv 2503.18013);
            validation keeps the first. None: it stays in training too.
        beta: In the reward mean_f1, objects that are missing weigh beta^2 times as much as boxes that are wrong.
        published_boxes: What the published scorer takes the numbers of an answer for: "unmapped" for pixels of the
            original image, as the public code does, or "resized" for those of the image that the model saw.
    """

    prompt_template: str = "Please output bbox coordinates and names of {labels}."
    reward: Literal["perception_r1", "mean_f1"] = "perception_r1"
    categories: tuple[str, ...] | None = None
    matching: Matching = "bipartite"
    format_weight: float = 0.25
    f1_weight: float = 0.75
    class_weight: float = 1.0
    iou_weight: float = 1.0
    missing_weight: float = 0.5
    iou_threshold: float = 0.5
    final_iou_threshold: float | None = None
    beta: float = 1.0
    published_boxes: Literal["unmapped", "resized"] = "unmapped"

    name = "detection"
    component_names = ("format", "f1", "class", "iou", "missing")
    metric_names = ("mean_f1", "precision", "recall", "num_boxes", "false_positives", "false_negatives")
    primary_metric = "ap50"
    published_metric_names = BoxAP.names
    row_keys = ("objects",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise UserError("categories must hold at least one name, and none twice")
        check_matching(self.matching)
        check_choice("reward", self.reward, ("perception_r1", "mean_f1"))
        check_weights(**{f"{name}_weight": weight for name, weight in self._weights.items()})
        check_beta(self.beta, self.reward)
        check_iou_thresholds(self.iou_threshold, self.final_iou_threshold)
        if self.reward == "mean_f1" and (self.iou_threshold, self.final_iou_threshold) != (0.5, None):
            raise UserError("reward mean_f1 has thresholds of its own; leave iou_threshold and final_iou_threshold out")

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the known categories."""
        return COCO_NAMES if self.categories is None else tuple(self.categories)

    def with_labels(self, labels: Iterable[str]) -> Self:
        """The task for categories of these names, unless `categories` gives others."""
        if self.categories is not None:
            return self
        return replace(self, categories=tuple(dict.fromkeys(labels)))

    def at_progress(self, progress: float) -> Self:
        """With the IoU that a pair needs by now."""
        return replace(self, iou_threshold=threshold_at(progress, self.iou_threshold, self.final_iou_threshold))

    @property
    def _weights(self) -> dict[str, float]:
        return {name: getattr(self, f"{name}_weight") for name in self.component_names}

    def read_row(self, row: Row) -> tuple[str, DetectionTarget]:
        """No query, and the labelled boxes of "objects" with their areas, crowds apart."""
        annotations = row.objects("objects")
        for label in (found.item.label for found in annotations):
            if label not in self.labels:
                raise RowError(f"objects: must have labels among the {len(self.labels)} categories, got {label!r}")
        objects = [found for found in annotations if not found.is_crowd]
        return "", DetectionTarget(
            objects=tuple(found.item for found in objects),
            areas=tuple(found.area for found in objects),
            crowds=tuple(found.item for found in annotations if found.is_crowd),
        )

    def format_target(self, sample: Sample[DetectionTarget], codec: Codec, image_size: ImageSize) -> str:
        """All objects in the order of the data."""
        return codec.format_boxes(sample.target.objects, image_size)

    def parse_answer(self, text: str, codec: Codec, image_size: ImageSize) -> DetectionPrediction | None:
        """Every valid object of the text; None when it is no list and lists nothing."""
        return self.read_boxes(codec.parse_boxes(text, image_size))

    def read_boxes(self, parsed: ParsedBoxes) -> DetectionPrediction | None:
        """All valid objects, and how many were listed."""
        if not parsed.items and not parsed.is_exact:
            return None
        objects = tuple(
            LabelledBox(label=item.label, box=item.box)
            for item in parsed.items
            if item.label is not None and item.label in self.labels and item.box is not None
        )
        return DetectionPrediction(objects=objects, num_listed=len(parsed.items), is_exact=parsed.is_exact)

    def parse_published(self, text: str, codec: Codec, image_size: ImageSize) -> DetectionPrediction | None:
        """The known objects of a JSON list, in the pixels that `published_boxes` says."""
        width, height = image_size.width, image_size.height
        if self.published_boxes == "resized":
            width, height = image_size.resized_width, image_size.resized_height
        read = [
            (label, _for_average_precision(x1 / width, y1 / height, x2 / width, y2 / height))
            for label, (x1, y1, x2, y2) in json_boxes(text, self.labels)
        ]
        objects = tuple(LabelledBox(label=label, box=box) for label, box in read if box is not None)
        return DetectionPrediction(objects=objects, num_listed=len(objects), is_exact=True)

    def score(self, prediction: DetectionPrediction | None, target: DetectionTarget) -> Score:
        """The five components; precision and recall are those of F1, whatever the labels."""
        objects = prediction.objects if prediction is not None else ()
        labels_agree, overlaps = self._pairs(objects, target.objects)
        num_pairs, num_boxes, num_targets = len(overlaps), len(objects), len(target.objects)
        is_rightly_empty = prediction is not None and prediction.num_listed == num_targets == 0
        precision = num_pairs / num_boxes if num_boxes else float(is_rightly_empty)
        recall = num_pairs / num_targets if num_targets else float(is_rightly_empty)
        components = {
            "format": _format(prediction),
            "f1": 2 * precision * recall / (precision + recall) if precision + recall else 0.0,
            "class": sum(labels_agree) / num_pairs if num_pairs else float(is_rightly_empty),
            "iou": sum(overlaps) / num_pairs if num_pairs else float(is_rightly_empty),
            "missing": 1 - num_pairs / num_targets if num_targets else 0.0,
        }
        mean_f1 = _mean_fbeta(prediction, target)
        metrics = {
            "mean_f1": mean_f1,
            "precision": precision,
            "recall": recall,
            "num_boxes": float(num_boxes),
            "false_positives": float(num_boxes - num_pairs),
            "false_negatives": float(num_targets - num_pairs),
        }
        if self.reward == "mean_f1":
            reward = mean_f1 if self.beta == 1 else _mean_fbeta(prediction, target, self.beta)
            return Score(reward=reward, components=components, metrics=metrics)
        gains = {name: weight for name, weight in self._weights.items() if name != "missing"}
        gain = sum(weight * components[name] for name, weight in gains.items())
        reward = min(max(gain - self.missing_weight * components["missing"], 0.0), sum(gains.values()))
        signed = self._weights | {"missing": -self.missing_weight}
        reward_terms = tuple((weight, components[name]) for name, weight in signed.items())
        return Score(reward=reward, components=components, metrics=metrics, reward_terms=reward_terms)

    def num_objects(self, target: DetectionTarget) -> int:
        """Those of the image."""
        return len(target.objects)

    def overlays(self, answer: DetectionTarget | DetectionPrediction) -> Sequence[Overlay]:
        """Every object with its name."""
        return [Overlay(shape=item.box, caption=item.label) for item in answer.objects]

    def describe(self, answer: DetectionTarget | DetectionPrediction) -> str:
        """How many objects of each name."""
        return super().describe(answer) if answer.objects else "no objects"

    def serialize_prediction(
        self, prediction: DetectionPrediction | None, image_size: ImageSize
    ) -> dict[str, object] | None:
        """`{"objects": [{"box": [x1, y1, x2, y2], "label": "..."}, ...]}`, the valid ones as the data writes them."""
        if prediction is None:
            return None
        objects = prediction.objects
        return {"objects": [{"box": to_pixels(item.box, image_size), "label": item.label} for item in objects]}

    def dataset_metrics(self) -> dict[str, Metric]:
        """COCO's average precision over the data set."""
        return {"ap": BoxAP(self.labels)}

    def _pairs(self, objects: Sequence[LabelledBox], targets: Sequence[LabelledBox]) -> tuple[list[bool], list[float]]:
        """Whether the labels agree, and the IoU, of each pair that stands."""
        boxes, target_boxes = [item.box for item in objects], [item.box for item in targets]
        overlaps = iou_matrix(boxes, target_boxes)
        labels_agree = _labels_agree(objects, targets)
        cost = _SIZE_COST * size_distances(boxes, target_boxes) - _OVERLAP_COST * giou_matrix(boxes, target_boxes)
        cost -= _LABEL_COST * labels_agree
        pairs = [pair for pair in match(cost, self.matching) if overlaps[pair] > self.iou_threshold]
        return [bool(labels_agree[pair]) for pair in pairs], [float(overlaps[pair]) for pair in pairs]


def _labels_agree(objects: Sequence[LabelledBox], targets: Sequence[LabelledBox]) -> NDArray[np.bool_]:
    """Whether those of each pair do, [N, M]."""
    labels, target_labels = (np.array([item.label for item in items], dtype=object) for items in (objects, targets))
    return np.asarray(labels[:, None] == target_labels, np.bool_)


def _mean_fbeta(prediction: DetectionPrediction | None, target: DetectionTarget, beta: float = 1) -> float:
    """F-beta of boxes of the right label, the mean over COCO's thresholds."""
    if prediction is None or not prediction.is_exact:
        return 0.0
    objects, targets = prediction.objects, target.objects
    overlaps = iou_matrix([item.box for item in objects], [item.box for item in targets])
    shares = threshold_shares(overlaps * _labels_agree(objects, targets), IOU_THRESHOLDS)
    return fbeta(best_share(shares), prediction.num_listed, len(targets), beta)


def _format(prediction: DetectionPrediction | None) -> float:
    """Share of the listed entries that are valid; an empty list is a valid one."""
    if prediction is None or not prediction.is_exact:
        return 0.0
    return len(prediction.objects) / prediction.num_listed if prediction.num_listed else 1.0


def _for_average_precision(x1: float, y1: float, x2: float, y2: float) -> Box | None:
    """A box with which average precision is what pycocotools finds for any four numbers.

    It takes a box by its corner and its sides. Where only one side is negative so is the area, and the box counts for
    nothing. Otherwise a box that is inverted or empty counts as a detection, and overlaps with nothing: it goes outside
    of the image.

    >>> _for_average_precision(0.5, 0.1, 0.2, 0.3)
    >>> _for_average_precision(0.75, 0.5, 0.25, 0.25)
    (-1.5, -1.25, -1.0, -1.0)
    """
    width, height = x2 - x1, y2 - y1
    if width > 0 and height > 0:
        return x1, y1, x2, y2
    if width * height < 0:
        return None
    return -1 - max(abs(width), _TINY), -1 - max(abs(height), _TINY), -1.0, -1.0


class DetectionData(TaskDataModule):
    """Images with all their labelled objects.

    Without `task.categories` the known names are those of the synthetic scenes or, with sources, those of the sources.
    """

    def __init__(self, task: Detection = Detection(), world: DetectionWorld = DetectionWorld(), **kwargs: Any) -> None:  # noqa: B008 - frozen
        super().__init__(task, world, **kwargs)
