"""Metrics over a whole data set as torchmetrics: means of rewards and scores, and COCO's average precision.

`make_metrics(task)` makes the one collection of which training, validation and test use clones with a prefix of their
own, and `update_metrics` feeds it; `TaskMetrics` holds those of all tasks of a run. A metric takes `preds` and
`target`; its state is float64 and depends neither on the batches nor on the number of devices.
"""

from perception_r1.metrics.box_ap import BoxAP, HasAnnotations, HasObjects
from perception_r1.metrics.collection import (
    PUBLISHED,
    TaskMetrics,
    make_metrics,
    margins_of_error,
    published_values,
    update_metrics,
)
from perception_r1.metrics.mean_score import MeanScore

__all__ = [
    "PUBLISHED",
    "BoxAP",
    "HasAnnotations",
    "HasObjects",
    "MeanScore",
    "TaskMetrics",
    "make_metrics",
    "margins_of_error",
    "published_values",
    "update_metrics",
]
