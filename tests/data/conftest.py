"""A task that is as small as a task can be: one text in, the same text out."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

from perception_r1.records import Score
from perception_r1.task import Task


@dataclass(frozen=True, kw_only=True)
class NameTask(Task[str, str]):
    prompt_template: str = "Name it."
    name = "name"
    component_names = ("same",)
    metric_names = ("same",)
    primary_metric = "same"
    row_keys = ("text",)

    def read_row(self, row):
        return "", row.text("text")

    def format_target(self, sample, codec, image_size):
        return sample.target

    def parse_answer(self, text, codec, image_size):
        return text

    def score(self, prediction, target):
        same = float(prediction == target)
        return Score(reward=same, components={"same": same}, metrics={"same": same})

    def overlays(self, answer):
        return []

    def serialize_prediction(self, prediction, image_size):
        return prediction


@pytest.fixture
def task() -> NameTask:
    return NameTask()


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., Path]:
    """Writes a data file of the given rows; strings are written as they are. Pictures `0.png` ... lie beside it."""

    def write(rows, name: str = "data.jsonl", num_images: int = 3) -> Path:
        for index in range(num_images):
            Image.new("RGB", (40 + index, 30), (index, 0, 0)).save(tmp_path / f"{index}.png")
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (tmp_path / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return tmp_path / name

    return write
