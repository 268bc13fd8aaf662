"""`predictions.jsonl`: an outcome as a row of JSON, and back to an outcome by judging its completion again.

A row is the data row that was answered, in its own form, with the completion and everything that is known about it. So
`perception-r1 score` reads it, and an evaluation that was killed goes on from it.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from perception_r1.callbacks.files import finite
from perception_r1.codecs import Codec
from perception_r1.errors import UserError
from perception_r1.records import Frame, Sample
from perception_r1.scoring import Outcome, judge
from perception_r1.task import Task

Key = tuple[str, str]
"""Source and id of a sample."""


def outcome_row(task: Task[Any, Any], outcome: Outcome) -> dict[str, Any]:
    """One outcome, ready for JSON."""
    sample, frame = outcome.sample, outcome.frame
    return {
        **{key: value for key, value in sample.row.items() if value is not None},
        "id": sample.id,
        "source": sample.source,
        "width": frame.width,
        "height": frame.height,
        "seen_width": frame.seen_width,
        "seen_height": frame.seen_height,
        "query": sample.query,
        "completion": outcome.completion,
        "prediction": task.describe(outcome.prediction, frame),
        "reward": outcome.score.reward,
        "terms": dict(outcome.score.terms),
        "figures": dict(outcome.score.figures),
        "num_tokens": outcome.num_tokens,
        "is_truncated": outcome.is_truncated,
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


def judge_again(task: Task[Any, Any], codec: Codec, sample: Sample[Any], row: Mapping[str, Any]) -> Outcome:
    """The outcome of a row, from its completion."""
    sizes = {name: row[name] for name in ("width", "height", "seen_width", "seen_height")}
    (outcome,) = judge(
        task,
        codec,
        samples=[sample],
        frames=[Frame(**sizes)],
        completions=[row["completion"]],
        lengths=[row["num_tokens"]],
        truncated=[row["is_truncated"]],
        is_evaluation=True,
    )
    return outcome
