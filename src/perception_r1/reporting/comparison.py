"""What changed: metrics before and after or in two runs, differences of the same samples, and settings that differ."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from scipy import stats

from perception_r1.reporting.answers import Answers
from perception_r1.reporting.folder import Metric, Record
from perception_r1.reporting.values import mapping

_CONFIDENCE = 0.95
_MAX_SETTINGS = 5000
"""Of a run: a file whose parts refer to each other may unfold without end."""
MISSING = "-"
"""In place of a setting that a run does not have."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """How much larger a metric is than another one.

    Attributes:
        value: Of the difference.
        margin: Half the width of its 95 % confidence interval; None where it is not known.
    """

    value: float
    margin: float | None = None

    @property
    def is_clear(self) -> bool:
        """Whether its interval leaves zero out."""
        return self.margin is not None and abs(self.value) > self.margin


def compare_metrics(first: tuple[Record, str], second: tuple[Record, str]) -> dict[Metric, Difference]:
    """The metrics of a record "before" or "after", less those of another; answers to the same samples tell how sure.

    Metrics of a whole data set, like AP, belong to no sample, so the margin of their difference is not known.
    """
    old, new = (record.metrics(when) for record, when in (first, second))
    paired = _paired_differences(*(record.answers[when] for record, when in (first, second)))
    differences = {}
    for metric in new:
        if metric in old:
            value, known = new[metric] - old[metric], paired.get(metric)
            is_same = known is not None and math.isclose(known.value, value, abs_tol=1e-4)  # of the same samples
            differences[metric] = Difference(value=value, margin=known.margin if known and is_same else None)
    return differences


def paired_difference(differences: Sequence[float]) -> Difference:
    """The mean of differences with its interval by Student's t.

    >>> round(paired_difference([0.0, 1.0, 0.0, 1.0]).margin, 4)
    0.9187
    >>> paired_difference([0.25, 0.25])
    Difference(value=0.25, margin=None)
    """
    count = len(differences)
    mean = sum(differences) / count
    variance = sum((each - mean) ** 2 for each in differences) / max(1, count - 1)
    if count < 2 or variance < 1e-14:  # all are equal, from which nobody could tell how rare others are
        return Difference(value=mean)
    quantile = float(stats.t.ppf((1 + _CONFIDENCE) / 2, count - 1))
    return Difference(value=mean, margin=quantile * math.sqrt(variance / count))


def settings_of(record: Record) -> dict[str, str]:
    """Every setting by the name that it has on the command line, as JSON.

    >>> from pathlib import Path
    >>> config = {"model": {"class_path": "a.GRPO", "init_args": {"seed": 0}}}
    >>> record = Record(folder=Path(), card={}, is_evaluation=False, config=config, values={}, widths={})
    >>> settings_of(record)
    {'model': 'GRPO', 'model.seed': '0'}
    """
    found: dict[str, str] = {}
    for name, value in _flatten("", record.config):
        found[name] = value
        if len(found) == _MAX_SETTINGS:
            break
    return found


def differing(settings: Sequence[Mapping[str, str]]) -> list[str]:
    """Names of the settings that are not the same in all runs."""
    names = dict.fromkeys(name for each in settings for name in each)
    return [name for name in names if len({each.get(name, MISSING) for each in settings}) > 1]


def _flatten(name: str, value: object) -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping) and "class_path" in value:
        yield name, str(value["class_path"]).rpartition(".")[2]
        value = mapping(value.get("init_args"))
    elif not isinstance(value, Mapping) or not value:
        yield name, value if isinstance(value, str) else json.dumps(value, default=str)
        return
    for key, item in mapping(value).items():
        yield from _flatten(f"{name}.{key}" if name else key, item)


def _paired_differences(first: Answers, second: Answers) -> dict[Metric, Difference]:
    """Of every score that the answers to the same samples have, as metrics are named."""
    shared = [key for key in second if key in first]
    sources = {task: len({key.source for key in second if key.task == task}) for task in {key.task for key in shared}}
    found: dict[Metric, list[float]] = {}
    for key in shared:
        for name, value in second[key].scores.items():
            if name in first[key].scores:
                prefix = f"{key.source}/" if sources[key.task] > 1 else ""
                metric = Metric(key.task, prefix + name)
                found.setdefault(metric, []).append(value - first[key].scores[name])
    return {metric: paired_difference(values) for metric, values in found.items()}
