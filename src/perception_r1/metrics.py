"""What is known about a whole data set: means of scores, and COCO's average precision.

`task_metrics(task)` is all that validation, testing and offline scoring need; its states add up over devices.
"""

import contextlib
import io
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from perception_r1.records import Frame, LabelledBox, Score
from perception_r1.task import Task

_COCO_STATS = (
    ("ap", 0),
    ("ap50", 1),
    ("ap75", 2),
    ("ap_small", 3),
    ("ap_medium", 4),
    ("ap_large", 5),
    ("ar", 8),
    ("ar_small", 9),
    ("ar_medium", 10),
    ("ar_large", 11),
)
"""Our names of pycocotools' figures and their places in `COCOeval.stats`; recalls are those at 100 detections."""

_IMAGE, _TARGET, _DETECTION = range(3)
"""Kinds of record in the state of `BoxAP`."""
_RECORD_SIZE = 6


def task_metrics(task: Task[Any, Any]) -> MetricCollection:
    """All metrics of a task under plain names ("reward", "iou", "ap50").

    `update(scores=..., predictions=..., targets=..., frames=...)` takes sequences of one length, `compute()` gives one
    flat dict of scalars. Metrics are never grouped: two that agree on the first batch would stay merged for ever.
    """
    return MetricCollection({"scores": score_means(task), **task.metrics()}, compute_groups=False)


def score_means(task: Task[Any, Any]) -> "ScoreMeans":
    """The metric of a task that is cheap enough for every training step: no figure over a whole data set."""
    return ScoreMeans(("reward", *task.term_names, *task.figure_names))


class ScoreMeans(Metric):
    """Mean reward, terms and figures over all samples; not a number before the first.

    Args:
        names: "reward" and the names of the terms and figures, all different.

    Raises:
        ValueError: A name is there twice.

    >>> means = ScoreMeans(("reward", "iou"))
    >>> means.update(scores=[Score(reward=2.0, terms={"iou": 1.0}), Score(reward=1.0, terms={"iou": 0.0})])
    >>> {name: value.item() for name, value in means.compute().items()}
    {'reward': 1.5, 'iou': 0.5}
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) < len(names):
            raise ValueError(f"names of terms and figures must all be different, not {', '.join(names)}")
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(self.names)), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, scores: Sequence[Score]) -> None:
        """Add the scores of a batch."""
        rows = [{"reward": score.reward, **score.terms, **score.figures} for score in scores]
        table = torch.tensor([[row[name] for name in self.names] for row in rows], device=self.sums.device)
        self.sums += table.reshape(-1, len(self.names)).sum(dim=0)
        self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name."""
        return dict(zip(self.names, self.sums / self.count, strict=True))


class HasObjects(Protocol):
    """A target or prediction that lists labelled boxes."""

    @property
    def objects(self) -> Sequence[LabelledBox]:
        """The labelled boxes."""


class BoxAP(Metric):
    """COCO's average precision and recall of boxes by pycocotools, each detection with score 1.0.

    Boxes are measured in pixels of the original image. Deviations from COCO's own numbers: small, medium and large go
    by the area of the box, not of the outline, and there are no crowd regions, as our data has neither. Detections
    beyond the first 100 of an image do not count, as in COCO. A figure without any object to judge it by is not a
    number.

    The state is one flat list of records of six numbers, (kind, category, x1, y1, x2, y2), in which every image is a
    record of its own kind followed by its targets and detections. So the states of several devices can be put one after
    the other, whatever their lengths, and no image needs a number that is unique among devices. Float32 holds pixels to
    a thousandth.

    Args:
        categories: All names that objects can have.
    """

    full_state_update = False
    records: list[Tensor]

    def __init__(self, categories: Sequence[str]) -> None:
        super().__init__()
        self.category_numbers = {name: number for number, name in enumerate(categories)}
        self.add_state("records", [], dist_reduce_fx="cat")

    def update(
        self,
        predictions: Sequence[HasObjects | None],
        targets: Sequence[HasObjects],
        frames: Sequence[Frame],
    ) -> None:
        """Add the images of a batch; None is a prediction without objects."""
        rows: list[tuple[float, ...]] = []
        for prediction, target, frame in zip(predictions, targets, frames, strict=True):
            rows.append((_IMAGE, 0, 0, 0, 0, 0))
            rows += [self._record(_TARGET, item, frame) for item in target.objects]
            if prediction is not None:
                rows += [self._record(_DETECTION, item, frame) for item in prediction.objects]
        if rows:
            self.records.append(torch.tensor(rows, dtype=self.dtype, device=self.device).flatten())

    def compute(self) -> dict[str, Tensor]:
        """The figures of `_COCO_STATS` by name."""
        has_records = isinstance(self.records, Tensor) or len(self.records) > 0  # a tensor once devices are merged
        flat = dim_zero_cat(self.records) if has_records else torch.zeros(0)
        rows = flat.double().cpu().reshape(-1, _RECORD_SIZE)
        stats = _coco_stats(rows, num_categories=len(self.category_numbers))
        values = {name: stats[place] for name, place in _COCO_STATS}
        return {
            name: torch.tensor(value if value >= 0 else float("nan"), device=self.device)
            for name, value in values.items()
        }

    def _record(self, kind: int, item: LabelledBox, frame: Frame) -> tuple[float, ...]:
        x1, y1, x2, y2 = item.box
        corners = (x1 * frame.width, y1 * frame.height, x2 * frame.width, y2 * frame.height)
        return kind, self.category_numbers[item.label], *corners


def _coco_stats(rows: Tensor, *, num_categories: int) -> list[float]:
    """The twelve numbers of `COCOeval.summarize`; -1 where COCO has nothing to judge.

    Args:
        rows: [records, 6], see `BoxAP`.
        num_categories: Number of categories.
    """
    kinds, image_numbers = rows[:, 0], (rows[:, 0] == _IMAGE).cumsum(0)
    num_images = int((kinds == _IMAGE).sum())
    if not (kinds == _TARGET).any():
        return [-1.0] * 12
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        target, detection = (
            _coco(rows[kinds == kind], image_numbers[kinds == kind], num_images, num_categories)
            for kind in (_TARGET, _DETECTION)
        )
        evaluation = COCOeval(target, detection, "bbox")
        evaluation.params.catIds = sorted(target.catToImgs)  # those without targets take time and count for nothing
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def _coco(rows: Tensor, image_numbers: Tensor, num_images: int, num_categories: int) -> COCO:
    """Objects as pycocotools wants them, ids from 1 on (it takes 0 for "no match")."""
    annotations = []
    for number, (image, (_, category, x1, y1, x2, y2)) in enumerate(
        zip(image_numbers.tolist(), rows.tolist(), strict=True), start=1
    ):
        width, height = x2 - x1, y2 - y1
        annotations.append(
            {
                "id": number,
                "image_id": image,
                "category_id": int(category) + 1,
                "bbox": [x1, y1, width, height],
                "area": width * height,
                "iscrowd": 0,
                "score": 1.0,
            }
        )
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number + 1} for number in range(num_images)],
        "categories": [{"id": number + 1} for number in range(num_categories)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
