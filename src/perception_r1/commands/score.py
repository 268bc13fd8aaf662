"""`perception-r1 score`: reward, components and metrics of completions that came from anywhere, without a model.

The file has rows of the data format (see `rows.py`), each with a "completion". The road is that of training and
validation from the completion on (`scoring.py`), so the numbers are the same. Everything is read and checked before the
first line is written.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jsonargparse

from perception_r1.commands.options import known, make_task, new_parser, option_value, parse, run_command, task_values
from perception_r1.data.images import ImageError
from perception_r1.data.sources import SourceRow, open_source
from perception_r1.errors import UserError
from perception_r1.metrics import make_metrics, published_values, update_metrics
from perception_r1.policy.families import CODECS
from perception_r1.records import ImageSize, UnloadedSample
from perception_r1.rewards import MAX_PIXELS, MIN_PIXELS, RowScorer
from perception_r1.rows import RowError, object_labels
from perception_r1.scoring import ScoredCompletion, score_as_published
from perception_r1.task import Task
from perception_r1.tasks import TASKS


def main(argv: Sequence[str]) -> int:
    """Score a file: one JSON line per row to stdout, a summary to stderr.

    Returns:
        0, or 2 after a user's error, which is told in one sentence on stderr.
    """
    return run_command("score", _score, argv)


def _score(argv: Sequence[str]) -> int:
    """Read and check everything, then score and write."""
    options = _parse(argv)
    rows = list(open_source(options.file))
    if not rows:
        raise UserError(f"{options.file}: is empty, it needs one JSON object per line")
    task_class, codec = TASKS[options.task], CODECS[options.codec]
    task = make_task(task_class, task_values(task_class, options))
    # besides the labels that it knows it accepts those of the file
    task = task.with_labels([*task.labels, *object_labels(row.values for row in rows)])
    scorer = RowScorer(task, codec, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
    samples, completions = zip(*(_read_row(scorer, row) for row in rows), strict=True)
    scored_completions = scorer.score(samples, completions)
    published = score_as_published(task, codec, scored_completions)
    for row, scored, other in zip(rows, scored_completions, published, strict=True):
        told = {"id": row.values["id"]} if "id" in row.values else {}
        prediction = task.serialize_prediction(scored.prediction, scored.image_size)
        score = scored.score
        told |= {"reward": score.reward, "components": score.components, "metrics": score.metrics}
        told |= {"prediction": prediction}
        if task.published_metric_names:
            told["published"] = {
                name: value for name, value in other.score.metrics.items() if name in task.published_metric_names
            }
        sys.stdout.write(json.dumps(told, allow_nan=False) + "\n")
    sys.stderr.write(_summary(task, scored_completions, published))
    return 0


def _parse(argv: Sequence[str]) -> jsonargparse.Namespace:
    """Options of the command line; the task's own come from the fields of its class.

    Raises:
        UserError: The command line is wrong.
    """
    parser = new_parser(
        "score",
        "Score completions from a file: one JSON line per row, and a summary on stderr.",
        "With --task, this help also shows the options of the task.",
    )
    parser.add_argument("file", type=Path, help='JSON lines of the data format, each with a "completion".')
    parser.add_argument("--task", required=True, help=f"One of {', '.join(TASKS)}.")
    parser.add_argument("--codec", required=True, help=f"The form of the completions, one of {', '.join(CODECS)}.")
    parser.add_argument("--min_pixels", type=int, default=MIN_PIXELS, help="Least pixels of a resized image.")
    parser.add_argument("--max_pixels", type=int, default=MAX_PIXELS, help="Most pixels of a resized image.")
    task_name = option_value(argv, "--task")
    if task_name is not None:
        parser.add_class_arguments(known("--task", task_name, TASKS), as_group=True)
    options = parse(parser, argv)
    known("--codec", options.codec, CODECS)
    return options


def _read_row(scorer: RowScorer, row: SourceRow) -> tuple[tuple[UnloadedSample[Any], ImageSize], str]:
    """What a row is to be scored against, and its completion.

    Raises:
        UserError: A key is missing or wrong; names file, line and key.
    """
    try:
        if row.problem is not None:
            raise RowError(row.problem)
        completion = row.values.get("completion")
        if not isinstance(completion, str):  # it may be any text
            fault = "is missing, the row needs the text to score" if completion is None else "must be a text"
            raise RowError(f"completion: {fault}")
        return scorer.read(row.values, image=row.image, name=str(row.number)), completion
    except (RowError, ImageError) as error:
        raise UserError(f"{row.location}: {error}") from error


def _summary(
    task: Task[Any, Any], scored_completions: Sequence[ScoredCompletion], published: Sequence[ScoredCompletion]
) -> str:
    """Means and metrics of each source of the file, one a line."""
    counts = Counter(scored.sample.source for scored in scored_completions)
    text = ""
    for source, count in counts.items():
        metrics, as_published = make_metrics(task), make_metrics(task)
        update_metrics(metrics, [scored for scored in scored_completions if scored.sample.source == source])
        update_metrics(as_published, [scored for scored in published if scored.sample.source == source])
        values = metrics.compute() | published_values(task, as_published)
        width = max(len(name) for name in values)
        rows = "".join(f"  {name:<{width}}  {float(value):.6g}\n" for name, value in values.items())
        text += f"{task.name}{f' of {source}' if source else ''}: {count} completions\n{rows}"
    return text
