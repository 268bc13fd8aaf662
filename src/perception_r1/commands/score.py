"""`perception-r1 score`: reward, components and metrics of completions that came from anywhere, without a model.

The file has rows of the data format (see `rows.py`), each with a "completion". The road is that of training and
validation from the completion on (`scoring.py`), so the numbers are the same. Everything is read and checked before the first
line is written.
"""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonargparse

from perception_r1.codecs import CODECS, Codec, Qwen25VLCodec
from perception_r1.commands.options import known, make_task, new_parser, option_value, parse, run_command, task_values
from perception_r1.data.categories import COCO_NAMES
from perception_r1.data.images import ImageError, check_image
from perception_r1.errors import UserError
from perception_r1.metrics import make_metrics, update_metrics
from perception_r1.records import ImageSize, Sample
from perception_r1.rows import Row, RowError
from perception_r1.scoring import ScoredCompletion, parse_completions, score_completions
from perception_r1.task import Task
from perception_r1.tasks import TASKS
from perception_r1.tasks.detection import Detection

_MIN_PIXELS, _MAX_PIXELS = 56 * 56, 28 * 28 * 1280
"""Least and most pixels after smart-resize, as Qwen2.5-VL's own processor has them."""
_TEXT_ONLY = {"text"}
"""Keys of rows that say nothing about places; a task with no others can do without the size of the image."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Line:
    """One row of the file, its JSON read but nothing else."""

    number: int
    values: dict[str, object]


def main(argv: Sequence[str]) -> int:
    """Score a file: one JSON line per row to stdout, a summary to stderr.

    Returns:
        0, or 2 after a user's error, which is told in one sentence on stderr.
    """
    return run_command("score", _score, argv)


def _score(argv: Sequence[str]) -> int:
    """Read and check everything, then score and write."""
    options = _parse(argv)
    lines = _read_lines(options.file)
    task, codec = _make_task(options, lines), CODECS[options.codec]
    rows = [_read_row(line, task, codec, options) for line in lines]
    samples, image_sizes, completions = zip(*rows, strict=True)
    parsed = parse_completions(task, codec, samples=samples, image_sizes=image_sizes, completions=completions)
    scored_completions = score_completions(task, parsed, is_evaluation=True)
    for line, scored in zip(lines, scored_completions, strict=True):
        sys.stdout.write(json.dumps(_described(line, scored, task), allow_nan=False) + "\n")
    sys.stderr.write(_summary(task, scored_completions))
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
    parser.add_argument("--min_pixels", type=int, default=_MIN_PIXELS, help="Least pixels of a resized image.")
    parser.add_argument("--max_pixels", type=int, default=_MAX_PIXELS, help="Most pixels of a resized image.")
    task_name = option_value(argv, "--task")
    if task_name is not None:
        parser.add_class_arguments(known("--task", task_name, TASKS), as_group=True)
    options = parse(parser, argv)
    known("--codec", options.codec, CODECS)
    if not 0 < options.min_pixels <= options.max_pixels:
        raise UserError(
            f"--min_pixels must be from 1 to --max_pixels, not {options.min_pixels} with {options.max_pixels}"
        )
    return options


def _make_task(options: jsonargparse.Namespace, lines: Sequence[_Line]) -> Task[Any, Any]:
    """The chosen task with its options; detection also knows the labels that the file itself uses.

    Raises:
        UserError: The task refuses its options.
    """
    task_class = TASKS[options.task]
    values = task_values(task_class, options)
    if task_class is Detection and values["categories"] is None:
        values["categories"] = tuple(dict.fromkeys([*COCO_NAMES, *_own_labels(lines)]))
    return make_task(task_class, values)


def _own_labels(lines: Sequence[_Line]) -> list[str]:
    """Labels of the file's objects in the order in which they come; what is malformed is left for `read_row`."""
    objects = [item for line in lines if isinstance(found := line.values.get("objects"), list) for item in found]
    labels = [item.get("label") for item in objects if isinstance(item, dict)]
    return [label for label in labels if isinstance(label, str)]


def _read_lines(path: Path) -> list[_Line]:
    """The rows of a file, blank lines left out.

    Raises:
        UserError: The file cannot be read, has no rows, or a line is no JSON object.
    """
    try:
        texts = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines() would also split inside JSON strings
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: must be UTF-8 text ({error.reason} at byte {error.start})") from error
    lines = [_read_line(path, number, text) for number, text in enumerate(texts, start=1) if text.strip()]
    if not lines:
        raise UserError(f"{path}: is empty, it needs one JSON object per line")
    return lines


def _read_line(path: Path, number: int, text: str) -> _Line:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}:{number}: the line must be a JSON object ({error})") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}:{number}: the line must be a JSON object in braces")
    return _Line(number=number, values=values)


def _read_row(
    line: _Line, task: Task[Any, Any], codec: Codec, options: jsonargparse.Namespace
) -> tuple[Sample[Any], ImageSize, str]:
    """Sample, image size and completion of one line.

    Raises:
        UserError: A key is missing or wrong; names file, line and key.
    """
    try:
        completion = _completion(line)
        image_size = _image_size(line, task, codec, options)
        row = Row(line.values, width=image_size.width, height=image_size.height)
        query, target = task.read_row(row)
    except (RowError, ImageError) as error:
        raise UserError(f"{options.file}:{line.number}: {error}") from error
    sample = Sample(
        id=str(line.values.get("id", line.number)),
        image=options.file.parent / str(line.values.get("image", "")),  # never opened: the size is known
        width=image_size.width,
        height=image_size.height,
        query=query,
        target=target,
        source=str(line.values.get("source") or ""),
    )
    return sample, image_size, completion


def _completion(line: _Line) -> str:
    """The text to score, which may be anything."""
    completion = line.values.get("completion")
    if not isinstance(completion, str):
        fault = "is missing, the row needs the text to score" if completion is None else "must be a text"
        raise RowError(f"completion: {fault}")
    return completion


def _image_size(line: _Line, task: Task[Any, Any], codec: Codec, options: jsonargparse.Namespace) -> ImageSize:
    """Sizes of the image: from "width" and "height", else from the file of "image"."""
    row = Row(line.values, width=1, height=1)
    if "width" in row or "height" in row:
        width, height = row.integer("width", minimum=1), row.integer("height", minimum=1)
    elif set(task.row_keys) <= _TEXT_ONLY:
        width = height = 1
    elif "image" in row:
        width, height = check_image(options.file.parent / row.text("image"))
    else:
        raise RowError("width: is missing, the row needs width and height, or an image to take them from")
    if "resized_width" in row or "resized_height" in row:  # written by an evaluation, which knows
        resized_width, resized_height = (
            row.integer("resized_width", minimum=1),
            row.integer("resized_height", minimum=1),
        )
        return ImageSize(width=width, height=height, resized_width=resized_width, resized_height=resized_height)
    resized_width, resized_height = width, height
    if isinstance(codec, Qwen25VLCodec) and not set(task.row_keys) <= _TEXT_ONLY:
        resized_width, resized_height = _resized_size(width, height, options)
    return ImageSize(width=width, height=height, resized_width=resized_width, resized_height=resized_height)


def _resized_size(width: int, height: int, options: jsonargparse.Namespace) -> tuple[int, int]:
    """The size of an image after Qwen2.5-VL's smart-resize."""
    # imported here, as it takes seconds that the other codecs need not wait
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    try:
        resized_height, resized_width = smart_resize(
            height, width, min_pixels=options.min_pixels, max_pixels=options.max_pixels
        )
    except ValueError as error:
        raise RowError(f"width: does not go with this height ({error})") from error
    return resized_width, resized_height


def _described(line: _Line, scored: ScoredCompletion, task: Task[Any, Any]) -> dict[str, object]:
    """One line of the output."""
    return {
        **({"id": line.values["id"]} if "id" in line.values else {}),
        "reward": scored.score.reward,
        "components": dict(scored.score.components),
        "metrics": dict(scored.score.metrics),
        "prediction": task.serialize_prediction(scored.prediction, scored.image_size),
    }


def _summary(task: Task[Any, Any], scored_completions: Sequence[ScoredCompletion]) -> str:
    """Means and metrics of each source of the file, one a line."""
    counts = Counter(scored.sample.source for scored in scored_completions)
    text = ""
    for source, count in counts.items():
        metrics = make_metrics(task)
        update_metrics(metrics, [scored for scored in scored_completions if scored.sample.source == source])
        values = metrics.compute()
        width = max(len(name) for name in values)
        rows = "".join(f"  {name:<{width}}  {float(value):.6g}\n" for name, value in values.items())
        text += f"{task.name}{f' of {source}' if source else ''}: {count} completions\n{rows}"
    return text
