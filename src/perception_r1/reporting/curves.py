"""What a run logged to TensorBoard, as curves in groups; long ones are thinned: a page has so many pixels."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

MAX_POINTS = 500
"""Of a curve; of a longer one, each point is the mean of as many steps."""
_MARGIN = "margin_of_error/"
_REWARD = r"(train|val)/(?!seconds/)([^/]+/)?reward"
_GROUPS = (
    ("Validation", r"val/(?!seconds|frac_seconds)"),
    ("Reward of sampled completions", r"train/(?!seconds/)(.+/)?reward(/.+)?$"),
    ("Policy", r"train/(kl|entropy|clip_fraction|logprob_mismatch)$"),
    ("Completions", r"train/(completion_length|truncation_rate|answer_length)$"),
    ("Groups", r"train/(reward_std|advantage_std|frac_\w+|group_size|num_prompts)$"),
    ("Update", r"train/(loss|grad_norm|lr|skipped_steps)$"),
    (
        "Time, tokens and memory",
        r"(train|val)/(seconds(/.+)?|frac_seconds|tokens_per_second|tokens/.+|peak_memory_gb)$",
    ),
    ("Other metrics of sampled completions", r"train/"),
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Curve:
    """A scalar over the steps of a run.

    Attributes:
        steps: Increasing.
        values: At each of them; None is not a number.
        margins: Half the width of the 95 % confidence interval of each value; None where it is not known.
        num_steps: How many steps each point is the mean of.
    """

    steps: list[int]
    values: list[float | None]
    margins: list[float | None]
    num_steps: int = 1


def read_curves(folder: Path) -> Mapping[str, Curve]:
    """The curves of a run by tag; none where it has logged nothing yet."""
    if not any(folder.glob("events.out.tfevents*")):
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    scalars = {
        tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]
    }  # of a step that is there twice, the later value
    curves = {}
    for tag, values in scalars.items():
        if _MARGIN not in tag and tag.startswith(("train/", "val/")):
            curves[tag] = _curve(values, scalars.get(_margin_tag(tag, scalars), {}))
    return curves


def grouped(tags: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Tags by what they tell of, in the order in which they are shown; the groups that have any."""
    left = sorted(tags, key=lambda tag: (not re.fullmatch(_REWARD, tag), tag.count("/"), tag))
    for name, pattern in _GROUPS:
        found = [tag for tag in left if re.match(pattern, tag)]
        left = [tag for tag in left if tag not in found]
        if found:
            yield name, found


def _margin_tag(tag: str, tags: Mapping[str, object]) -> str:
    """The tag of its margins: val/margin_of_error/METRIC, of several tasks val/TASK/margin_of_error/METRIC."""
    stage, _, name = tag.partition("/")
    part, _, rest = name.partition("/")
    own = f"{stage}/{_MARGIN}{name}"
    return own if own in tags else f"{stage}/{part}/{_MARGIN}{rest}"


def _curve(values: Mapping[int, float], margins: Mapping[int, float]) -> Curve:
    steps = sorted(values)
    size = math.ceil(len(steps) / MAX_POINTS)
    parts = [steps[start : start + size] for start in range(0, len(steps), size)]
    return Curve(
        steps=[part[len(part) // 2] for part in parts],
        values=[_mean([values[step] for step in part]) for part in parts],
        margins=[_mean([margins.get(step, math.nan) for step in part]) for part in parts],
        num_steps=size,
    )


def _mean(values: Sequence[float]) -> float | None:
    """The mean, in six digits; None where it is not a number."""
    mean = sum(values) / len(values)
    return float(f"{mean:.6g}") if math.isfinite(mean) else None
