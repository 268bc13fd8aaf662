"""Answers to held-out samples, from the rows that a run or an evaluation keeps."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from perception_r1.callbacks.files import image_name
from perception_r1.reporting.values import is_number, mapping, numbers


class SampleKey(NamedTuple):
    """What two runs must agree on for their answers to stand side by side.

    Attributes:
        task: Name of the task.
        source: Name of the sample's source within the task.
        id: Of the sample, unique within its source.
        query: What is asked for.
        target: The right answer in words.
    """

    task: str
    source: str
    id: str
    query: str
    target: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """A completion and what it is worth.

    Attributes:
        completion: As the model wrote it.
        words: As it was read; None: no answer could be read.
        overlays: What to draw: "shape" in fractions of the image, and "caption".
        target_overlays: The same of the right answer.
        size: Width and height of the image in pixels.
        image_name: Name of its small picture, if one was kept.
        scores: Reward, components as reward/NAME, and metrics.
        is_truncated: It ran into the length limit.
    """

    completion: str
    words: str | None
    overlays: list[Mapping[str, Any]]
    target_overlays: list[Mapping[str, Any]]
    size: tuple[int, int]
    image_name: str
    scores: Mapping[str, float]
    is_truncated: bool

    @property
    def reward(self) -> float:
        """Of the completion."""
        return self.scores["reward"]


Answers = Mapping[SampleKey, Answer]
"""In the order of the data."""


def read_answers(path: Path, tasks: Mapping[str, str]) -> Answers:
    """The rows of a file, which need not be there; lines that are no whole rows are passed over.

    Args:
        path: The file.
        tasks: Name of the task of each part of the run; that of the only part is empty.
    """
    return dict(_read(row, tasks) for row in _rows(path))


def _read(row: Mapping[str, Any], tasks: Mapping[str, str]) -> tuple[SampleKey, Answer]:
    source, sample_id, words = str(row.get("source") or ""), str(row["id"]), row.get("prediction_in_words")
    part, _, rest = source.partition("/")
    is_mixture = "" not in tasks
    key = SampleKey(
        task=tasks.get(part, part) if is_mixture else tasks[""],
        source=rest if is_mixture else source,
        id=sample_id,
        query=str(row.get("query") or ""),
        target=str(row.get("target_in_words") or ""),
    )
    components = {f"reward/{name}": value for name, value in numbers(row.get("components")).items()}
    width, height = row.get("width"), row.get("height")
    return key, Answer(
        completion=str(row.get("completion") or ""),
        words=None if words is None else str(words),
        overlays=list(_overlays(row.get("predicted_overlays"))),
        target_overlays=list(_overlays(row.get("target_overlays"))),
        size=(max(1, round(width)), max(1, round(height))) if is_number(width) and is_number(height) else (1, 1),
        image_name=image_name(source, sample_id),
        scores=numbers(row.get("metrics")) | components | {"reward": float(row["reward"])},
        is_truncated=row.get("is_truncated") is True,
    )


def _rows(path: Path) -> Iterator[Mapping[str, Any]]:
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(row, Mapping) and "id" in row and is_number(row.get("reward")):
                yield row


def _overlays(value: object) -> Iterator[Mapping[str, Any]]:
    """Those of a row that can be drawn."""
    for overlay in value if isinstance(value, list) else ():
        shape = mapping(overlay).get("shape")
        if isinstance(shape, list) and len(shape) in (2, 4) and all(map(is_number, shape)):
            yield {"shape": shape, "caption": str(mapping(overlay).get("caption", ""))}
