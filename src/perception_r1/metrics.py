"""Metrics over a whole data set as torchmetrics: means of rewards and scores, and COCO's average precision.

`make_metrics(task)` makes the one collection of which training, validation and test use clones with a prefix of their
own, and `update_metrics` feeds it; `TaskMetrics` holds those of all tasks of a run. A metric takes `preds` and
`target`; its state is float64 and depends neither on the batches nor on the number of devices.
"""

import contextlib
import hashlib
import io
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from perception_r1.records import ImageSize, LabelledBox, Score
from perception_r1.scoring import ScoredCompletion, score_prediction
from perception_r1.task import AnyTask, Task, part_of, tasks_of

PUBLISHED = "published/"
"""Before the name of a metric of answers that were read as the public evaluation code reads them."""

_COCO_STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}
_COCO_STATS |= {"ar": 8, "ar_small": 9, "ar_medium": 10, "ar_large": 11}
"""Our names of pycocotools' metrics and their indices in `COCOeval.stats`; recalls are those at 100 detections."""

_IMAGE, _TARGET, _CROWD, _DETECTION = range(4)
"""Kinds of record in the state of `BoxAP`."""
_RECORD_SIZE = 7
_DECIMALS = 6
"""Decimals of a pixel that count. A fraction times the size of the image misses the annotated number by some 1e-13,
which would decide where an overlap or an area lies exactly on a threshold."""
_MAX_DIGITS, _HASH_BITS = 15, 52
"""Whole numbers of so many digits or bits are exact in float64."""


def make_metrics(task: Task[Any, Any], *, is_evaluation: bool = True) -> MetricCollection:
    """All metrics of a task as one collection, to be cloned with a prefix: `make_metrics(task).clone(prefix="val/")`.

    `compute()` gives one flat dict of float64 scalars by name, which is the prefix and one of

        reward               the mean reward
        reward/COMPONENT     the mean of each of `task.component_names`
        METRIC               the mean of each of `task.metric_names` and `task.eval_metric_names`
        METRIC               over the whole data set, of each of `task.dataset_metrics()` (AP, say)

    Metrics are never grouped: two that agree on the first batch would stay merged for ever.

    Args:
        task: The task.
        is_evaluation: False leaves out what is too slow for every training step, `eval_metrics` and `dataset_metrics`.
    """
    metrics = MetricCollection({"scores": MeanScore(task, is_evaluation=is_evaluation)}, compute_groups=False)
    if is_evaluation:
        metrics.add_metrics({**task.dataset_metrics()})  # behind the means: given at once they were sorted by name
    return metrics


def update_metrics(metrics: MetricCollection, scored_completions: Sequence[ScoredCompletion]) -> None:
    """Feed scored completions to a task's metrics; none of them is scored again."""
    metrics.update(
        preds=[scored.prediction for scored in scored_completions],
        target=[scored.sample.target for scored in scored_completions],
        scores=[scored.score for scored in scored_completions],
        image_sizes=[scored.image_size for scored in scored_completions],
        ids=[scored.sample.id for scored in scored_completions],
    )


class TaskMetrics(nn.Module):
    """The metrics of all tasks of a run: PREFIX/METRIC, or PREFIX/TASK/METRIC where there are several.

    Args:
        task: What the run is trained on.
        prefix: Of all names.
        is_evaluation: See `make_metrics`.
    """

    def __init__(self, task: AnyTask, prefix: str, *, is_evaluation: bool = True) -> None:
        super().__init__()
        self.task = task
        made = {name: make_metrics(each, is_evaluation=is_evaluation) for name, each in tasks_of(task).items()}
        self.collections = nn.ModuleList(
            metrics.clone(prefix=f"{prefix}/{name}/" if name else f"{prefix}/") for name, metrics in made.items()
        )
        self._names = list(made)

    def update(self, scored_completions: Sequence[ScoredCompletion]) -> None:
        """Feed each completion to the metrics of its own task."""
        for name, metrics in zip(self._names, self.collections, strict=True):
            own = [scored for scored in scored_completions if part_of(self.task, scored.sample.source) == name]
            if own or len(self._names) == 1:
                update_metrics(cast(MetricCollection, metrics), own)

    def compute(self) -> dict[str, Tensor]:
        """All of them; not a number where no completion was seen."""
        return {tag: value for metrics in self.collections for tag, value in cast(Any, metrics).compute().items()}

    def reset(self) -> None:
        """Begin anew."""
        for metrics in self.collections:
            cast(MetricCollection, metrics).reset()


def published_values(task: Task[Any, Any], metrics: MetricCollection) -> dict[str, Tensor]:
    """Those that are published, as published/METRIC, from metrics that were fed what `score_as_published` gives."""
    values, prefix = metrics.compute(), metrics.prefix or ""
    names = [name for name in task.published_metric_names if prefix + name in values]
    return {f"{PUBLISHED}{name}": values[prefix + name] for name in names}


class _ExactMetric(Metric):
    """A metric whose state stays float64 when the module around it is cast; it moves between devices only."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, also where a device has none yet."""
        return torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)


class MeanScore(_ExactMetric):
    """Mean reward, components and metrics of a task's predictions; not a number before the first.

    Args:
        task: What scores a prediction.
        is_evaluation: The metrics include the task's `eval_metrics`.

    Raises:
        ValueError: Two components or two metrics have one name.

    >>> from perception_r1.tasks.ocr import Ocr, OcrTarget
    >>> means = MeanScore(Ocr())
    >>> means.update(preds=["n quzxk", None], target=[OcrTarget(text="on quick")] * 2)
    >>> {name: value.item() for name, value in means.compute().items()}
    {'reward': 0.3125, 'reward/similarity': 0.3125, 'edit_distance': 0.6875, 'exact_match': 0.0}
    """

    full_state_update = False
    sums: Tensor
    count: Tensor

    def __init__(self, task: Task[Any, Any], *, is_evaluation: bool = True) -> None:
        super().__init__()
        self.task = task
        self.is_evaluation = is_evaluation
        metric_names = (*task.metric_names, *(task.eval_metric_names if is_evaluation else ()))
        self.names = ("reward", *(f"reward/{name}" for name in task.component_names), *metric_names)
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"names of components and of metrics must all be different, not {', '.join(self.names)}")
        self.add_state("sums", torch.zeros(len(self.names), dtype=self.dtype), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=self.dtype), dist_reduce_fx="sum")

    def update(self, preds: Sequence[Any], target: Sequence[Any], scores: Sequence[Score] | None = None) -> None:
        """Add a batch, None being a sample without prediction; scores that are not given are computed."""
        if scores is None:
            pairs = zip(preds, target, strict=True)
            scores = [score_prediction(self.task, *pair, is_evaluation=self.is_evaluation) for pair in pairs]
        rows = []
        for score in scores:
            components = {f"reward/{name}": value for name, value in score.components.items()}
            values = {"reward": score.reward, **components, **score.metrics}
            rows.append([values[name] for name in self.names])
        table = torch.tensor(rows, dtype=self.dtype, device=self.sums.device)
        # not in place: a state that was reset in inference mode may be updated outside of it
        self.sums = self.sums + table.reshape(-1, len(self.names)).sum(dim=0)
        self.count = self.count + len(rows)

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name, see `make_metrics`."""
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
    COCO. A metric for which there is no object at all is not a number.

    With equal scores the precision at a recall depends on the order of the images, which is COCO's: by their ids. Ids
    that are no whole numbers (of up to 15 digits) come last, in the order of their hashes.

    The state is one flat list of records of seven numbers. An image is a record (kind, 0 or 1 for what is no number, id
    or hash, 0, 0, 0, 0), followed by its targets, crowds and detections as (kind, category, x, y, width, height, area).
    So the states of several devices can be put one after the other, whatever their lengths.

    Args:
        categories: All names that objects can have.
    """

    full_state_update = False
    names = tuple(_COCO_STATS)
    """Of the metrics, as `compute` gives them."""
    records: list[Tensor]

    def __init__(self, categories: Sequence[str]) -> None:
        super().__init__()
        self.category_numbers = {name: number for number, name in enumerate(categories, start=1)}
        self.add_state("records", [], dist_reduce_fx="cat")

    def update(
        self,
        preds: Sequence[HasObjects | None],
        target: Sequence[HasAnnotations],
        image_sizes: Sequence[ImageSize],
        ids: Sequence[str],
    ) -> None:
        """Add the images of a batch, one id each; None is a prediction without objects."""
        rows: list[tuple[float, ...]] = []
        for prediction, annotated, image_size, image_id in zip(preds, target, image_sizes, ids, strict=True):
            rows.append((_IMAGE, *_sort_key(image_id), 0, 0, 0, 0))
            areas = annotated.areas or [None] * len(annotated.objects)
            for item, area in zip(annotated.objects, areas, strict=True):
                rows.append(self._record(_TARGET, item, image_size, area))
            rows += [self._record(_CROWD, item, image_size) for item in annotated.crowds]
            if prediction is not None:
                rows += [self._record(_DETECTION, item, image_size) for item in prediction.objects]
        if rows:
            self.records.append(torch.tensor(rows, dtype=self.dtype, device=self.device).flatten())

    def compute(self) -> dict[str, Tensor]:
        """The metrics of `_COCO_STATS` by name."""
        has_records = isinstance(self.records, Tensor) or len(self.records) > 0  # a tensor once devices are merged
        flat = dim_zero_cat(self.records) if has_records else torch.zeros(0, dtype=self.dtype)
        stats = _coco_stats(flat.cpu().numpy().reshape(-1, _RECORD_SIZE), num_categories=len(self.category_numbers))
        values = torch.tensor(stats, dtype=self.dtype, device=self.device)
        return {name: values[index] for name, index in _COCO_STATS.items()}

    def _record(
        self, kind: int, item: LabelledBox, image_size: ImageSize, area: float | None = None
    ) -> tuple[float, ...]:
        (x1, y1, x2, y2), across, down = item.box, image_size.width, image_size.height
        sides = x1 * across, y1 * down, (x2 - x1) * across, (y2 - y1) * down
        x, y, width, height = (round(side, _DECIMALS) for side in sides)
        return kind, self.category_numbers[item.label], x, y, width, height, width * height if area is None else area


def _sort_key(image_id: str) -> tuple[int, int]:
    """Where an image stands among all: whole numbers first, each as its value, then all other ids by a hash.

    >>> _sort_key("000000000139") < _sort_key("285") < _sort_key("page 7")
    True
    """
    if image_id.isascii() and image_id.isdigit() and len(image_id) <= _MAX_DIGITS:
        return 0, int(image_id)
    digest = hashlib.sha256(image_id.encode(errors="surrogatepass")).digest()
    return 1, int.from_bytes(digest[:8]) >> (64 - _HASH_BITS)


def _coco_stats(rows: NDArray[np.float64], *, num_categories: int) -> NDArray[np.float64]:
    """[12] what `COCOeval.summarize` finds in [records, 7], see `BoxAP`; not a number where there is no object."""
    kinds = rows[:, 0]
    images = rows[kinds == _IMAGE]
    if not (kinds == _TARGET).any():
        return np.full(12, np.nan)
    numbers = np.empty(len(images), dtype=int)
    numbers[np.lexsort((images[:, 2], images[:, 1]))] = range(1, len(images) + 1)  # in the order of their keys
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
    return np.where(evaluation.stats < 0, np.nan, evaluation.stats)


def _coco(rows: NDArray[np.float64], image_numbers: NDArray[np.int_], *, num_images: int, num_categories: int) -> COCO:
    """Objects as pycocotools wants them, ids from 1 on (it takes 0 for "no match")."""
    annotations = []
    for number, (image, row) in enumerate(zip(image_numbers.tolist(), rows.tolist(), strict=True), start=1):
        kind, category, *box, area = row
        annotation = {"id": number, "image_id": image, "category_id": int(category), "bbox": box, "area": area}
        annotations.append(annotation | {"iscrowd": int(kind == _CROWD), "score": 1.0})
    coco = COCO()
    coco.dataset = {
        "images": [{"id": number + 1} for number in range(num_images)],
        "categories": [{"id": number + 1} for number in range(num_categories)],
        "annotations": annotations,
    }
    coco.createIndex()
    return coco
