"""The worked vectors of tests/golden, as the program itself would read them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, Score
from perception_r1.rows import Row
from perception_r1.task import Task

FOLDER = Path(__file__).parents[1] / "golden"


def read(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").read_text().splitlines()]


def score(task: Task[Any, Any], codec: str, values: Mapping[str, Any]) -> Score:
    """The score of one vector by way of `read_row` and `parse_completion`, its image not resized."""
    width, height = values.get("width", 1), values.get("height", 1)
    image_size = ImageSize(width=width, height=height, resized_width=width, resized_height=height)
    _, target = task.read_row(Row(values, width=width, height=height))
    return task.score(task.parse_completion(values["completion"], CODECS[codec], image_size), target)


def flat(result: Score) -> dict[str, float]:
    """Reward, components and metrics in one."""
    return {"reward": result.reward, **result.components, **result.metrics}
