"""The order of a curriculum: from what the policy does well before training to what it does badly.

The paper scores the training set once with the base model and lets a run go from higher rewards to lower ones.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perception_r1.data.sources import DataError, open_source
from perception_r1.records import Sample


def easy_to_hard(samples: Sequence[Sample[Any]], path: Path) -> list[int]:
    """Indices of samples by falling reward; equal rewards keep their order.

    `path` is the `predictions.jsonl` of an evaluation of the policy before training on the same rows.

    Raises:
        DataError: The file cannot be read, or a sample has no reward in it.
    """
    rewards = _rewards(path)
    missing = [sample for sample in samples if (sample.source, sample.id) not in rewards]
    if missing:
        raise DataError(
            f"{path}: has no reward for {len(missing)} of {len(samples)} training samples, first {missing[0].id}; "
            "evaluate the policy on the rows that it is to be trained on"
        )
    return sorted(range(len(samples)), key=lambda index: -rewards[samples[index].source, samples[index].id])


def _rewards(path: Path) -> dict[tuple[str, str], float]:
    """Reward by source and id."""
    found: dict[tuple[str, str], float] = {}
    for row in open_source(path):
        name, reward = row.values.get("id"), row.values.get("reward")
        if name is None or not isinstance(reward, int | float):
            problem = row.problem or "it has no id or no reward"
            raise DataError(f"{row.location}: must be a row of the predictions.jsonl of an evaluation ({problem})")
        found[str(row.values.get("source", "")), str(name)] = float(reward)
    return found
