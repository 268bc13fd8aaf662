"""Mean reward, components and metrics of a task's predictions."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from perception_r1.metrics.base import ExactMetric
from perception_r1.records import Score
from perception_r1.scoring import score_prediction
from perception_r1.task import Task


class MeanScore(ExactMetric):
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
    squares: Tensor
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
        self.add_state("squares", torch.zeros(len(self.names), dtype=self.dtype), dist_reduce_fx="sum")
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
        table = table.reshape(-1, len(self.names))
        self.sums, self.squares = self.sums + table.sum(dim=0), self.squares + table.square().sum(dim=0)
        self.count = self.count + len(rows)

    def compute(self) -> dict[str, Tensor]:
        """The mean of each name, see `make_metrics`."""
        return dict(zip(self.names, self.sums / self.count, strict=True))

    def standard_errors(self) -> tuple[dict[str, Tensor], int]:
        """That of each mean, from the variance of the samples (unbiased), and the number of samples."""
        deviations = (self.squares - self.sums.square() / self.count).clamp(min=0)
        errors = (deviations / (self.count - 1) / self.count).sqrt()
        return dict(zip(self.names, errors, strict=True)), int(self.count)
