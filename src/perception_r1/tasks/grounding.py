"""Grounding: one box for the thing that a phrase names. Reward = format + IoU^2."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

from perception_r1.codecs import Codec, ParsedBoxes
from perception_r1.data.module import TaskDataModule
from perception_r1.data.synthetic.objects import GroundingWorld
from perception_r1.geometry import IOU_THRESHOLDS, center, giou_matrix, iou, iou_matrix, threshold_shares, to_pixels
from perception_r1.published import first_box
from perception_r1.records import Box, ImageSize, LabelledBox, Overlay, Sample, Score
from perception_r1.rows import Row
from perception_r1.task import Task
from perception_r1.tasks._options import check_choice, check_iou_thresholds, check_weights, threshold_at

_THRESHOLDS = {"accuracy_50": 0.50, "accuracy_75": 0.75, "accuracy_95": 0.95}
"""IoU from which on a box counts as right."""
_ROUNDING = 1e-9
"""What rounding in fractions of the image may take from a metric that lies exactly on a threshold in pixels."""

_TINY = 1e-9
"""Half the side of a box that stands for a point."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundingTarget:
    """The one right box."""

    box: Box


@dataclass(frozen=True, kw_only=True, slots=True)
class GroundingPrediction:
    """What an answer points at.

    Attributes:
        boxes: Every valid box that was listed; a good answer has one.
        label: The name that the answer gives to its first valid box, or nothing.
        is_well_formed: The whole answer is exactly one labelled box.
    """

    boxes: tuple[Box, ...]
    label: str
    is_well_formed: bool


@dataclass(frozen=True, kw_only=True)
class Grounding(Task[GroundingTarget, GroundingPrediction]):
    """Output the bounding box of what a phrase names.

    Reward = format_weight * format + iou_weight * IoU^2. With no valid box, or more than one, the IoU is 0.

    >>> task, target = Grounding(), GroundingTarget(box=(0.0, 0.0, 0.5, 1.0))
    >>> good = GroundingPrediction(boxes=((0.0, 0.0, 0.5, 0.5),), label="cup", is_well_formed=True)
    >>> task.score(good, target).reward
    1.25
    >>> wordy = GroundingPrediction(boxes=((0.0, 0.0, 0.5, 1.0),), label="cup", is_well_formed=False)
    >>> task.score(wordy, target).reward
    1.0
    >>> task.score(None, target).reward
    0.0

    With `reward` thresholds it is, from 0 to 1, the share of COCO's IoU thresholds that a single well-formed box
    reaches; with giou, (1 + generalised IoU) / 2 of that box, which also tells boxes apart that miss.

    Attributes:
        reward: That of Perception-R1, "thresholds" or "giou".
        format_weight: Weight of the format component: 1 when the whole text is exactly one labelled box.
        iou_weight: Weight of the squared IoU.
        iou_threshold: A box with a lower IoU earns nothing beyond its format.
        final_iou_threshold: In training `iou_threshold` goes evenly to this, as in Vision-R1 (arXiv 2503.18013);
            validation keeps the first. None: it stays in training too.
    """

    prompt_template: str = "Output the bounding box of the {query} in the image."
    reward: Literal["perception_r1", "thresholds", "giou"] = "perception_r1"
    format_weight: float = 1.0
    iou_weight: float = 1.0
    iou_threshold: float = 0.0
    final_iou_threshold: float | None = None

    name = "grounding"
    component_names = ("format", "iou")
    metric_names = (*_THRESHOLDS, "accuracy_mean", "center_accuracy", "false_positives", "false_negatives")
    primary_metric = "accuracy_50"
    published_metric_names = ("reward/iou", *_THRESHOLDS, "accuracy_mean", "center_accuracy")
    row_keys = ("question", "box")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reward", self.reward, ("perception_r1", "thresholds", "giou"))
        check_weights(format_weight=self.format_weight, iou_weight=self.iou_weight)
        check_iou_thresholds(self.iou_threshold, self.final_iou_threshold)

    def at_progress(self, progress: float) -> Self:
        """With the IoU that a box needs by now."""
        return replace(self, iou_threshold=threshold_at(progress, self.iou_threshold, self.final_iou_threshold))

    def read_row(self, row: Row) -> tuple[str, GroundingTarget]:
        """The phrase of "question" and the box of "box"."""
        return row.text("question"), GroundingTarget(box=row.box("box"))

    def format_target(self, sample: Sample[GroundingTarget], codec: Codec, image_size: ImageSize) -> str:
        """The right box, labelled with the phrase."""
        return codec.format_boxes([LabelledBox(label=sample.query, box=sample.target.box)], image_size)

    def parse_answer(self, text: str, codec: Codec, image_size: ImageSize) -> GroundingPrediction | None:
        """Every valid box of the text; None when it lists nothing at all."""
        return self.read_boxes(codec.parse_boxes(text, image_size))

    def read_boxes(self, parsed: ParsedBoxes) -> GroundingPrediction | None:
        """All valid boxes, and whether they are a single one."""
        if not parsed.items:
            return None
        named = [(item.label, item.box) for item in parsed.items if item.box is not None]
        return GroundingPrediction(
            boxes=tuple(box for _, box in named),
            label=named[0][0] or "" if named else "",
            is_well_formed=parsed.is_exact and len(parsed.items) == len(named) == 1 and named[0][0] is not None,
        )

    def parse_published(self, text: str, codec: Codec, image_size: ImageSize) -> GroundingPrediction | None:
        """The first four numbers in brackets, whatever is around them; a point at the origin without any."""
        x1, y1, x2, y2 = (number / 1000 for number in first_box(text))
        if x1 >= x2 or y1 >= y2:  # it overlaps with nothing, and still has a center
            x, y = center((x1, y1, x2, y2))
            x1, y1, x2, y2 = x - _TINY, y - _TINY, x + _TINY, y + _TINY
        return GroundingPrediction(boxes=((x1, y1, x2, y2),), label="", is_well_formed=False)

    def score(self, prediction: GroundingPrediction | None, target: GroundingTarget) -> Score:
        """Format and IoU; an accuracy is the share of boxes with at least that IoU, `accuracy_mean` that of the three.

        The center is right when it lies in the target box (the public code's convention).
        """
        boxes = prediction.boxes if prediction is not None else ()
        is_single = len(boxes) == 1
        overlap = iou(boxes[0], target.box) if is_single else 0.0
        accuracies = {name: float(overlap >= threshold - _ROUNDING) for name, threshold in _THRESHOLDS.items()}
        hit = accuracies["accuracy_50"]
        components = {"format": float(prediction is not None and prediction.is_well_formed), "iou": overlap}
        metrics = accuracies | {
            "accuracy_mean": sum(accuracies.values()) / len(accuracies),
            "center_accuracy": float(is_single and _holds_center(target.box, boxes[0])),
            "false_positives": len(boxes) - hit,
            "false_negatives": 1 - hit,
        }
        is_near = overlap >= self.iou_threshold - _ROUNDING
        if self.reward != "perception_r1":
            is_answer = is_single and components["format"] == 1 and is_near
            reward = self._reward(boxes[0], target.box) if is_answer else 0.0
            return Score(reward=reward, components=components, metrics=metrics)
        reward_terms = (self.format_weight, components["format"]), (self.iou_weight, overlap**2 if is_near else 0.0)
        reward = sum(weight * value for weight, value in reward_terms)
        return Score(reward=reward, components=components, metrics=metrics, reward_terms=reward_terms)

    def _reward(self, box: Box, target: Box) -> float:
        """Of a single well-formed box."""
        if self.reward == "giou":
            return (1 + float(giou_matrix([box], [target])[0, 0])) / 2
        return float(threshold_shares(iou_matrix([box], [target]), IOU_THRESHOLDS)[0, 0])

    def overlays(self, answer: GroundingTarget | GroundingPrediction) -> Sequence[Overlay]:
        """The box of a target, every box of a prediction."""
        if isinstance(answer, GroundingTarget):
            return [Overlay(shape=answer.box)]
        return [Overlay(shape=box, caption=answer.label) for box in answer.boxes]

    def describe(self, answer: GroundingTarget | GroundingPrediction) -> str:
        """How many boxes, and the name that an answer gives to them."""
        return super().describe(answer) if self.overlays(answer) else "no box"

    def serialize_prediction(
        self, prediction: GroundingPrediction | None, image_size: ImageSize
    ) -> dict[str, list[list[float]]] | None:
        """`{"boxes": [[x1, y1, x2, y2], ...]}`, every valid box in pixels of the original image."""
        if prediction is None:
            return None
        return {"boxes": [to_pixels(box, image_size) for box in prediction.boxes]}


def _holds_center(outer: Box, box: Box) -> bool:
    """Whether the middle of a box lies in another, edges included."""
    x, y = center(box)
    x1, y1, x2, y2 = outer
    return x1 - _ROUNDING <= x <= x2 + _ROUNDING and y1 - _ROUNDING <= y <= y2 + _ROUNDING


class GroundingData(TaskDataModule):
    """Images with a question and the box that answers it."""

    def __init__(self, task: Grounding = Grounding(), world: GroundingWorld = GroundingWorld(), **kwargs: Any) -> None:  # noqa: B008 - frozen
        super().__init__(task, world, **kwargs)
