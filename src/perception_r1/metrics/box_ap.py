"""COCO's average precision and recall of boxes."""

import contextlib
import hashlib
import io
from collections.abc import Sequence
from copy import copy
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from perception_r1.metrics.base import ExactMetric
from perception_r1.records import ImageSize, LabelledBox

_COCO_STATS = {"ap": 0, "ap50": 1, "ap75": 2, "ap_small": 3, "ap_medium": 4, "ap_large": 5}
_COCO_STATS |= {"ar": 8, "ar_small": 9, "ar_medium": 10, "ar_large": 11}
"""Our names of pycocotools' metrics and their indices in `COCOeval.stats`; recalls are those at 100 detections."""

_BOOTSTRAPPED = ("ap", "ap50", "ap75", "ar")
"""Those whose standard errors are found."""
_IMAGE, _TARGET, _CROWD, _DETECTION = range(4)
"""Kinds of record in the state of `BoxAP`."""
_RECORD_SIZE = 7
_DECIMALS = 6
"""Decimals of a pixel that count. A fraction times the size of the image misses the annotated number by some 1e-13,
which would decide where an overlap or an area lies exactly on a threshold."""
_NUM_RESAMPLES = 200
"""Sets of images of which the standard error of an average precision is found: to about 5 % of its value."""
_MAX_DIGITS, _HASH_BITS = 15, 52
"""Whole numbers of so many digits or bits are exact in float64."""


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


class BoxAP(ExactMetric):
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
        evaluation = self._evaluation()
        stats = np.full(12, np.nan) if evaluation is None else _stats(evaluation)
        values = torch.tensor(stats, dtype=self.dtype, device=self.device)
        return {name: values[index] for name, index in _COCO_STATS.items()}

    def standard_errors(self) -> tuple[dict[str, Tensor], int]:
        """Those over all areas by the bootstrap over images, and the number of images; the others are not known."""
        evaluation = self._evaluation()
        num_images = 0 if evaluation is None else len(evaluation.params.imgIds)
        found = {} if evaluation is None or num_images < 2 else _bootstrapped(evaluation)
        errors = torch.tensor([found.get(name, np.nan) for name in self.names], dtype=self.dtype, device=self.device)
        return dict(zip(self.names, errors, strict=True)), num_images

    def _evaluation(self) -> COCOeval | None:
        """All images, with what was detected in each."""
        has_records = isinstance(self.records, Tensor) or len(self.records) > 0  # a tensor once devices are merged
        flat = dim_zero_cat(self.records) if has_records else torch.zeros(0, dtype=self.dtype)
        return _evaluate(flat.cpu().numpy().reshape(-1, _RECORD_SIZE), num_categories=len(self.category_numbers))

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


def _evaluate(rows: NDArray[np.float64], *, num_categories: int) -> COCOeval | None:
    """What was detected in each image, from [records, 7], see `BoxAP`; None where there is no object."""
    kinds = rows[:, 0]
    images = rows[kinds == _IMAGE]
    if not (kinds == _TARGET).any():
        return None
    numbers = np.empty(len(images), dtype=int)
    numbers[np.lexsort((images[:, 2], images[:, 1]))] = range(1, len(images) + 1)  # in the order of their keys
    image_numbers = numbers[(kinds == _IMAGE).cumsum() - 1]  # [records]
    is_target, is_detection = np.isin(kinds, (_TARGET, _CROWD)), kinds == _DETECTION
    with _silent():
        target, detection = (
            _coco(rows[chosen], image_numbers[chosen], num_images=len(images), num_categories=num_categories)
            for chosen in (is_target, is_detection)
        )
        evaluation = COCOeval(target, detection, "bbox")
        evaluation.params.catIds = sorted(target.catToImgs)  # those without targets take time and count for nothing
        evaluation.evaluate()
    return evaluation


def _stats(evaluation: COCOeval) -> NDArray[np.float64]:
    """[12] what `COCOeval.summarize` finds; not a number where there is no object."""
    with _silent():
        evaluation.accumulate()
        evaluation.summarize()
    return np.where(evaluation.stats < 0, np.nan, evaluation.stats)


def _bootstrapped(evaluation: COCOeval) -> dict[str, float]:
    """Standard errors of the metrics over all areas: their deviation over sets of images drawn with replacement."""
    params = copy(evaluation.params)
    params.areaRng, params.areaRngLbl, params.maxDets = params.areaRng[:1], params.areaRngLbl[:1], params.maxDets[-1:]
    num_images, generator = len(params.imgIds), np.random.default_rng(0)
    every, rows = evaluation.evalImgs, range(0, len(evaluation.evalImgs), num_images)
    found = []
    for _ in range(_NUM_RESAMPLES):
        drawn = np.sort(generator.integers(num_images, size=num_images)).tolist()  # in the order of their keys, as ever
        evaluation.evalImgs = [every[start + image] for start in rows for image in drawn]  # by category, area and image
        with _silent():
            evaluation.accumulate(params)
        precision, recall = (evaluation.eval[name] for name in ("precision", "recall"))
        by_threshold = [precision, precision[params.iouThrs == 0.5], precision[params.iouThrs == 0.75], recall]
        found.append([values[values > -1].mean() if (values > -1).any() else np.nan for values in by_threshold])
    return dict(zip(_BOOTSTRAPPED, np.nanstd(found, axis=0, ddof=1).tolist(), strict=True))


def _silent() -> contextlib.AbstractContextManager[object]:
    """Nothing on the screen: pycocotools prints."""
    return contextlib.redirect_stdout(io.StringIO())


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
