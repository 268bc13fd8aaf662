"""All metrics of a task as one collection, and those of all tasks of a run; they are fed with scored completions."""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn
from torchmetrics import MetricCollection

from perception_r1.metrics.base import ExactMetric
from perception_r1.metrics.mean_score import MeanScore
from perception_r1.scoring import ScoredCompletion
from perception_r1.task import AnyTask, Task, part_of, tasks_of

PUBLISHED = "published/"
"""Before the name of a metric of answers that were read as the public evaluation code reads them."""
MARGIN = "margin_of_error/"
"""Before the name of a metric where half the width of its 95 % confidence interval is logged."""


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


def margins_of_error(metrics: MetricCollection) -> dict[str, Tensor]:
    """Half the width of the 95 % confidence interval of each metric, by the names of `metrics.compute()`.

    Not a number where it is not known, and nothing of metrics of a task's own. To be called on all devices at once.
    """
    margins = [metric.margins_of_error() for metric in metrics.values() if isinstance(metric, ExactMetric)]
    return {f"{metrics.prefix or ''}{name}": value for found in margins for name, value in found.items()}


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

    def margins_of_error(self) -> dict[str, Tensor]:
        """Of all means, PREFIX/margin_of_error/METRIC, where they are known; those of AP would take too long here."""
        margins: dict[str, Tensor] = {}
        for metrics in self.collections:
            found = cast(Any, metrics)["scores"].margins_of_error()
            margins |= {f"{metrics.prefix}{MARGIN}{name}": value for name, value in found.items()}
        return {tag: value for tag, value in margins.items() if not value.isnan()}

    def reset(self) -> None:
        """Begin anew."""
        for metrics in self.collections:
            cast(MetricCollection, metrics).reset()


def published_values(task: Task[Any, Any], metrics: MetricCollection) -> dict[str, Tensor]:
    """Those that are published, as published/METRIC, from metrics that were fed what `score_as_published` gives."""
    values, prefix = metrics.compute(), metrics.prefix or ""
    names = [name for name in task.published_metric_names if prefix + name in values]
    return {f"{PUBLISHED}{name}": values[prefix + name] for name in names}
