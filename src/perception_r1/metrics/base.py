"""What the metrics share: a state in float64, and how sure their values are."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from math import nan

import torch
from scipy import stats
from torch import Tensor, nn
from torchmetrics import Metric

CONFIDENCE = 0.95
"""Of the intervals."""
_ROUNDING = 1e-7
"""A standard error below this may be one of rounding: it is the root of a difference of sums."""


class ExactMetric(Metric, ABC):
    """A metric whose state stays float64 when the module around it is cast; it moves between devices only."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the state, also where a device has none yet."""
        return torch.float64

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> nn.Module:
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), exclude_state)

    def margins_of_error(self) -> dict[str, Tensor]:
        """Half the width of the 95 % confidence interval of each value of `compute`, by Student's t over the samples.

        Not a number where it is not known: with less than two samples, and where all have the same value, from which
        nobody could tell how rare others are. As `compute`, it is to be called on all devices at once.
        """
        with self.sync_context():
            errors, num_samples = self.standard_errors()
        quantile = stats.t.ppf((1 + CONFIDENCE) / 2, num_samples - 1) if num_samples > 1 else nan
        return {name: error.where(error > _ROUNDING, nan) * quantile for name, error in errors.items()}

    @abstractmethod
    def standard_errors(self) -> tuple[dict[str, Tensor], int]:
        """Standard error of each value that `compute` gives, and the number of samples, of the state as it is here."""
