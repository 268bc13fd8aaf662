"""`predictions.jsonl`: a scored completion as a row of JSON, and back by scoring it again.

A row is the data row that was answered, in its own form, with the completion and everything that is known about it. So
`perception-r1 score` reads it, an evaluation that was killed goes on from it, and a report draws it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from perception_r1.callbacks.files import finite
from perception_r1.codecs import Codec
from perception_r1.errors import UserError
from perception_r1.records import ImageSize, Overlay, Sample
from perception_r1.scoring import ScoredCompletion, parse_completions, score_completions
from perception_r1.task import Task

Key = tuple[str, str]
"""Source and id of a sample."""
_MAX_DESCRIPTION = 600
"""Characters of a target or prediction in words; the row has all of it besides."""
_DIGITS = 5
"""Decimals of a fraction in an overlay: more than a screen shows."""


def prediction_row(task: Task[Any, Any], scored: ScoredCompletion) -> dict[str, Any]:
    """One scored completion, ready for JSON."""
    sample, image_size, prediction = scored.sample, scored.image_size, scored.prediction
    return {
        **{key: value for key, value in sample.row.items() if value is not None},
        "id": sample.id,
        "source": sample.source,
        **asdict(image_size),
        "query": sample.query,
        "completion": scored.completion,
        "prediction": task.serialize_prediction(prediction, image_size),
        "reward": scored.score.reward,
        "components": dict(scored.score.components),
        "metrics": dict(scored.score.metrics),
        "num_tokens": scored.num_tokens,
        "is_truncated": scored.is_truncated,
        "target_in_words": task.describe(sample.target)[:_MAX_DESCRIPTION],
        "prediction_in_words": None
        if scored.prediction is None
        else task.describe(scored.prediction)[:_MAX_DESCRIPTION],
        "target_overlays": _overlays(task.overlays(sample.target)),
        "predicted_overlays": [] if prediction is None else _overlays(task.overlays(prediction)),
    }


def row_key(row: Mapping[str, Any]) -> Key:
    """Which sample a row answers."""
    return row["source"], row["id"]


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows so that a reader sees the old file or the new one, never half of one."""
    draft = path.with_name(path.name + ".tmp")
    with draft.open("w", encoding="utf-8") as lines:
        lines.writelines(row_line(row) for row in rows)
    draft.replace(path)


def row_line(row: Mapping[str, Any]) -> str:
    """A row as a line in ASCII, so that no character of a completion can break it."""
    return json.dumps(finite(row)) + "\n"


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a file; a line that was not written to its end is passed over.

    Raises:
        UserError: The file cannot be read.
    """
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                if line.endswith("\n"):
                    yield json.loads(line)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as predictions ({error}); remove it to answer again.") from error


def rescore(task: Task[Any, Any], codec: Codec, sample: Sample[Any], row: Mapping[str, Any]) -> ScoredCompletion:
    """The scored completion of a row."""
    parsed = parse_completions(
        task,
        codec,
        samples=[sample],
        image_sizes=[ImageSize(**{field.name: row[field.name] for field in fields(ImageSize)})],
        completions=[row["completion"]],
        lengths=[row["num_tokens"]],
        truncated=[row["is_truncated"]],
    )
    return score_completions(task, parsed, is_evaluation=True)[0]


def _overlays(overlays: Iterable[Overlay]) -> list[dict[str, Any]]:
    """Boxes and points in fractions of the image, so that they can be drawn at any size."""
    return [{"shape": [round(value, _DIGITS) for value in each.shape], "caption": each.caption} for each in overlays]
