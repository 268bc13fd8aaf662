"""What is known about a whole data set: means of scores, and COCO's average precision.

`task_metrics(task)` and `update_metrics` are all that validation, testing and offline scoring need. Metrics are float64
and depend neither on the batches nor on the number of devices.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from perception_r1.records import ImageSize, LabelledBox, Score
from perception_r1.scoring import ScoredCompletion
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
"""Our names of pycocotools' metrics and their places in `COCOeval.stats`; recalls are those at 100 detections."""

_IMAGE, _TARGET, _CROWD, _DETECTION = range(4)
"""Kinds of record in the state of `BoxAP`."""
_RECORD_SIZE = 7
_DECIMALS = 6
"""Decimals of a pixel that count. A fraction times the size of the image misses the annotated number by some 1e-13,
which would decide where an overlap or an area lies exactly on a threshold."""
_MAX_DIGITS, _HASH_BITS = 15, 52
"""Whole numbers of so many digits or bits are exact in float64."""


def task_metrics(task: Task[Any, Any]) -> MetricCollection:
    """All metrics of a task under plain names ("reward", "iou", "ap50"), from scores with the metrics of evaluation.

    `update(scores=..., predictions=..., targets=..., image_sizes=..., ids=...)` takes sequences of one length,
    `compute()` gives one flat dict of float64 scalars. Metrics are never grouped: two that agree on the first batch would
    stay merged for ever.
    """
    means = MeanScore(("reward", *task.component_names, *task.metric_names, *task.eval_metric_names))
    return MetricCollection({"scores": means, **task.dataset_metrics()}, compute_groups=False)


def update_metrics(metrics: MetricCollection, scored_completions: Sequence[ScoredCompletion]) -> None:
    """Feed scored completions to a task's metrics."""
    metrics.update(
        scores=[scored.score for scored in scored_completions],
        predictions=[scored.prediction for scored in scored_completions],
        targets=[scored.sample.target for scored in scored_completions],
        image_sizes=[scored.image_size for scored in scored_completions],
        ids=[scored.sample.id for scored in scored_completions],
    )


class SourceMetrics:
    """The metrics of a task for each source of a data set; a single source needs no name.

    Args:
        task: The task.
        names: Of the sources, as in `Sample.source`.
        device: Where the states are: those of several processes are added up there.
    """

    def __init__(self, task: Task[Any, Any], names: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.by_source = {name: task_metrics(task).to(device) for name in names}

    def update(self, scored_completions: Sequence[ScoredCompletion]) -> None:
        """Feed scored completions of any of the sources."""
        for name, metrics in self.by_source.items():
            own = [scored for scored in scored_completions if len(self.by_source) == 1 or scored.sample.source == name]
            if own:
                update_metrics(metrics, own)

    def compute(self) -> dict[str, dict[str, float]]:
        """Metrics by name, by source."""
        return {
            name: {metric: float(value) for metric, value in metrics.compute().items()}
            for name, metrics in self.by_source.items()
        }


def score_means(task: Task[Any, Any]) -> "MeanScore":
    """The metric of a task that is cheap enough for every training step: no metric over a whole data set."""
    return MeanScore(("reward", *task.component_names, *task.metric_names))


class _ExactMetric(Metric):
    """A metric whose state stays float64 when the module around it is cast; it moves between devices only."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, also where a device has none yet."""
        return torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class MeanScore(_ExactMetric):
    """Mean reward, components and metrics over all samples; not a number before the first.

    Args:
        names: "reward" and the names of the components and metrics, all different.

    Raises:
        ValueError: A name is there twice.

    >>> means = MeanScore(("reward", "iou"))
    >>> means.update(scores=[Score(reward=2.0, components={"iou": 1.0}), Score(reward=1.0, components={"iou": 0.0})])
    >>> {name: value.item() for name, value in means.compute().items()}
    {'reward': 1.5, 'iou': 0.5}
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        if len(set(names)) < len(names):
            raise ValueError(f"names of components and metrics must all be different, not {', '.join(names)}")
        self.names = tuple(names)
        self.add_state("sums", torch.zeros(len(self.names), dtype=self.dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=self.dtype), dist_reduce_fx="sum")

    def update(self, scores: Sequence[Score]) -> None:
        """Add the scores of a batch."""
        rows = [{"reward": score.reward, **score.components, **score.metrics} for score in scores]
        values = [[row[name] for name in self.names] for row in rows]
        table = torch.tensor(values, dtype=self.dtype, device=self.sums.device)
        self.sums += table.reshape(-1, len(self.names)).sum(dim=0)
        self.count += len(scores)

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name."""
        return dict(zip(self.names, self.sums / self.count, strict=True))


class HasObjects(Protocol):
    """A prediction that lists labelled boxes."""

    @property
    def objects(self) -> Sequence[LabelledBox]:
        """The labelled boxes."""


class HasAnnotations(HasObjects, Protocol):
    """A target that lists labelled boxes."""

    @property
    def areas(self) -> Sequence[float | None]:
        """Area of each object in pixels squared of the original image, None for that of its box; or nothing at all."""

    @property
    def crowds(self) -> Sequence[LabelledBox]:
        """Regions of many objects, in which no detection is right or wrong."""


class BoxAP(_ExactMetric):
    """COCO's average precision and recall of boxes by pycocotools, each detection with score 1.0.

    Boxes are measured in pixels of the original image. Detections beyond the first 100 of an image do not count, as in
    COCO. A metric without any object to judge it by is not a number.

    With equal scores the precision at a recall depends on the order of the images, which is COCO's: by their ids. Ids
    that are no whole numbers (of up to 15 digits) come last, in the order of their hashes.

    The state is one flat list of records of seven numbers. An image is a record (kind, 0 or 1 for what is no number, id
    or hash, 0, 0, 0, 0), followed by its targets, crowds and detections as (kind, category, x, y, width, height, area).
    So the states of several devices can be put one after the other, whatever their lengths.

    Args:
        categories: All names that objects can have.
    """

    full_state_update = False
    records: list[Tensor]

    def __init__(self, categories: Sequence[str]) -> None:
        super().__init__()
        self.category_numbers = {name: number for number, name in enumerate(categories, start=1)}
        self.add_state("records", [], dist_reduce_fx="cat")

    def update(
        self,
        predictions: Sequence[HasObjects | None],
        targets: Sequence[HasAnnotations],
        image_sizes: Sequence[ImageSize],
        ids: Sequence[str],
    ) -> None:
        """Add the images of a batch, one id each; None is a prediction without objects."""
        rows: list[tuple[float, ...]] = []
        for prediction, target, image_size, image_id in zip(predictions, targets, image_sizes, ids, strict=True):
            rows.append((_IMAGE, *_place(image_id), 0, 0, 0, 0))
            areas = target.areas or [None] * len(target.objects)
            for item, area in zip(target.objects, areas, strict=True):
                rows.append(self._record(_TARGET, item, image_size, area))
            rows += [self._record(_CROWD, item, image_size) for item in target.crowds]
            if prediction is not None:
                rows += [self._record(_DETECTION, item, image_size) for item in prediction.objects]
        if rows:
            self.records.append(torch.tensor(rows, dtype=self.dtype, device=self.device).flatten())

    def compute(self) -> dict[str, Tensor]:
        """The metrics of `_COCO_STATS` by name."""
        has_records = isinstance(self.records, Tensor) or len(self.records) > 0  # a tensor once devices are merged
        flat = dim_zero_cat(self.records) if has_records else torch.zeros(0, dtype=self.dtype)
        stats = _coco_stats(flat.cpu().numpy().reshape(-1, _RECORD_SIZE), num_categories=len(self.category_numbers))
        values = {name: stats[place] for name, place in _COCO_STATS}
        return {
            name: torch.tensor(value if value >= 0 else float("nan"), dtype=self.dtype, device=self.device)
            for name, value in values.items()
        }

    def _record(
        self, kind: int, item: LabelledBox, image_size: ImageSize, area: float | None = None
    ) -> tuple[float, ...]:
        x1, y1, x2, y2 = item.box
        sides = (
            x1 * image_size.width,
            y1 * image_size.height,
            (x2 - x1) * image_size.width,
            (y2 - y1) * image_size.height,
        )
        x, y, width, height = (round(side, _DECIMALS) for side in sides)
        return kind, self.category_numbers[item.label], x, y, width, height, width * height if area is None else area


def _place(image_id: str) -> tuple[int, int]:
    """Where an image stands among all: whole numbers first, each as its value, then all other ids by a hash.

    >>> _place("000000000139") < _place("285") < _place("page 7")
    True
    """
    if image_id.isascii() and image_id.isdigit() and len(image_id) <= _MAX_DIGITS:
        return 0, int(image_id)
    digest = hashlib.sha256(image_id.encode(errors="surrogatepass")).digest()
    return 1, int.from_bytes(digest[:8]) >> (64 - _HASH_BITS)


def _coco_stats(rows: NDArray[np.float64], *, num_categories: int) -> list[float]:
    """The twelve numbers of `COCOeval.summarize`; -1 where COCO has nothing to judge.

    Args:
        rows: [records, 7], see `BoxAP`.
        num_categories: Number of categories.
    """
    kinds = rows[:, 0]
    images = rows[kinds == _IMAGE]
    if not (kinds == _TARGET).any():
        return [-1.0] * 12
    numbers = np.empty(len(images), dtype=int)
    numbers[np.lexsort((images[:, 2], images[:, 1]))] = range(1, len(images) + 1)  # in order of their places
    image_numbers = numbers[(kinds == _IMAGE).cumsum() - 1]  # [records]
    is_target, is_detection = np.isin(kinds, (_TARGET, _CROWD)), kinds == _DETECTION
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints
        target, detection = (
            _coco(rows[chosen], image_numbers[chosen], num_images=len(images), num_categories=num_categories)
            for chosen in (is_target, is_detection)
        )
        evaluation = COCOeval(target, detection, "bbox")
        evaluation.params.catIds = sorted(target.catToImgs)  # those without targets take time and count for nothing
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return [float(value) for value in evaluation.stats]


def _coco(rows: NDArray[np.float64], image_numbers: NDArray[np.int_], *, num_images: int, num_categories: int) -> COCO:
    """Objects as pycocotools wants them, ids from 1 on (it takes 0 for "no match")."""
    annotations = []
    for number, (image, (kind, category, *box, area)) in enumerate(
        zip(image_numbers.tolist(), rows.tolist(), strict=True), start=1
    ):
        annotations.append(
            {
                "id": number,
                "image_id": image,
                "category_id": int(category),
                "bbox": box,
                "area": area,
                "iscrowd": int(kind == _CROWD),
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
