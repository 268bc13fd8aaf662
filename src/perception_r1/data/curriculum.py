"""The order of a curriculum: from what the policy does well before training to what it does badly.

The paper scores the training set once with the base model and lets a run go from higher rewards to lower ones.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perception_r1.data.sources import DataError
from perception_r1.records import Sample


def easy_to_hard(samples: Sequence[Sample[Any]], path: Path) -> list[int]:
    """Indices of samples by falling reward; equal rewards keep their order.

    Args:
        samples: The training samples.
        path: `predictions.jsonl` of an evaluation of the policy before training on the same rows.

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
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                found[row.get("source", ""), str(row["id"])] = float(row["reward"])
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: must be the predictions.jsonl of an evaluation ({error})") from error
    return found
