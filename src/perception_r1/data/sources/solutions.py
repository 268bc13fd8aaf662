"""From a problem and its solution, as the data sets of other trainers have them, to a row of the project's own form.

A solution is whatever their reward compares an answer with: a box, points, a number, a text, a list of labelled boxes,
or a text that spells out one of these, as JSON or as Python writes it. It tells no task, so the row has the keys of
every task that it can be read for.
"""

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from perception_r1.data.categories import COCO_NAME_OF
from perception_r1.rows import RowError, is_number, short_repr

Unit = Literal["pixels", "thousandths", "percent", "fractions"]

TOLERANCE = 1.0
"""Pixels by which the boxes of public files may lie outside their image: many have COCO's rounded boxes."""
_BOX_KEYS, _LABEL_KEYS, _POINT_KEYS = ("bbox_2d", "bbox", "box"), ("label", "phrase", "caption"), ("point_2d", "point")
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?(.*?)```", re.DOTALL)
_DIGITS = re.compile(r"[0-9]{1,9}")
_REQUEST = re.compile(
    r"Please provide the bounding box coordinates? of the region this sentence describes: (?P<phrase>.*?)\.?"
)
"""VLM-R1's words around a phrase."""
_NONE = ("None", "null", "[]")
"""What a list without objects is written as."""


def problem_text(problem: object) -> object:
    r"""The question of a problem without marks of images; of a chat it is the last turn of the user.

    >>> problem_text([{"role": "user", "content": "<image>\nHow many cups?"}])
    'How many cups?'
    >>> problem_text("Please provide the bounding box coordinate of the region this sentence describes: red cup.")
    'red cup'
    """
    if isinstance(problem, list):
        turns = [turn for turn in problem if isinstance(turn, Mapping) and turn.get("role", "user") == "user"]
        problem = turns[-1].get("content") if turns else None
    if not isinstance(problem, str):
        return problem
    text = problem.replace("<image>", "").strip()
    request = _REQUEST.fullmatch(text)
    return request["phrase"] if request else text


def solution_keys(problem: object, solution: object) -> dict[str, object]:
    """Keys of a row but for its image and its unit.

    Args:
        problem: As `problem_text` gives it; it names the things where the solution has no labels.
        solution: As the data set has it.

    Raises:
        RowError: It is none of the known forms.

    >>> solution_keys("red cup", "[1, 2, 3, 4]")
    {'question': 'red cup', 'box': [1, 2, 3, 4]}
    >>> solution_keys("cups", [[1, 2], [3, 4]])
    {'label': 'cups', 'points': [[1, 2], [3, 4]]}
    >>> solution_keys("cups", "<answer> 3 </answer>")
    {'text': '<answer> 3 </answer>', 'label': 'cups', 'count': 3}
    """
    value = spelled(solution)
    if isinstance(value, Mapping) and _first(value, _BOX_KEYS) is not None:
        value = [value]
    if isinstance(value, Mapping):
        return {"objects": _of_coco(value)}
    if is_number(value):
        return {"label": problem, "count": value}
    if isinstance(value, str):
        number = _DIGITS.fullmatch(_unwrapped(value))
        return {"text": solution} | ({"label": problem, "count": int(number[0])} if number else {})
    if not isinstance(value, list):
        raise RowError(
            "solution: must be a box, a list of points, a number, a text, or target_id with target_box, or objects"
        )
    if not value:
        return {"label": problem, "points": [], "objects": []}
    if len(value) == 4 and all(is_number(number) for number in value):
        return {"question": problem, "box": value}
    entries = [item for item in value if isinstance(item, Mapping)]
    boxes = [_first(entry, _BOX_KEYS) for entry in entries]
    if len(entries) == len(value) and None not in boxes:
        return box_keys(problem, boxes, [_first(entry, _LABEL_KEYS) for entry in entries])
    points = [_first(entry, _POINT_KEYS) for entry in entries]
    if len(entries) == len(value) and None not in points:
        return {"label": problem, "points": points}
    if all(isinstance(item, list) and len(item) == 4 for item in value):
        return box_keys(problem, value, [None] * len(value))
    return {"label": problem, "points": point_pairs(value)}


def box_keys(problem: object, boxes: Sequence[object], labels: Sequence[object]) -> dict[str, object]:
    """Keys of boxes: of detection where all have labels, of counting, and of grounding where there is one.

    >>> for key, value in box_keys("find them", [[1, 2, 3, 4]], ["cup"]).items():
    ...     print(key, value)
    objects [{'box': [1, 2, 3, 4], 'label': 'cup'}]
    label cup
    boxes [[1, 2, 3, 4]]
    question cup
    box [1, 2, 3, 4]
    """
    keys: dict[str, object] = {}
    if None not in labels:
        keys["objects"] = [{"box": box, "label": label} for box, label in zip(boxes, labels, strict=True)]
    is_one_label = bool(labels) and all(isinstance(label, str) and label == labels[0] for label in labels)
    keys |= {"label": labels[0] if is_one_label else problem, "boxes": list(boxes)}
    if len(boxes) == 1:
        keys |= {"question": problem if labels[0] is None else labels[0], "box": boxes[0]}
    return keys


def spelled(value: object) -> object:
    r"""What a text spells out, in tags, fenced or bare, as JSON or as Python writes it; any other text stays as it is.

    Nothing is evaluated but literals.

    >>> spelled("<answer>[{'bbox_2d': (1, 2, 3, 4), 'label': \"dog's bed\"}]</answer>")
    [{'bbox_2d': [1, 2, 3, 4], 'label': "dog's bed"}]
    >>> spelled("[see page 3]")
    '[see page 3]'
    """
    if not isinstance(value, str):
        return value
    text = _unwrapped(value)
    if text in _NONE:
        return []
    if not text.startswith(("[", "(", "{")):
        return value
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange literals
            return _with_lists(ast.literal_eval(text))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return value


def point_pairs(value: Any) -> object:
    """Points as pairs, from pairs, from `{"x": ..., "y": ...}` each, or from all x and all y.

    What is none of these is left for the check of the row.
    """
    if isinstance(value, Mapping):
        xs, ys = value.get("x"), value.get("y")
        if not isinstance(xs, list) or not isinstance(ys, list) or len(xs) != len(ys):
            return None if xs is ys is None else value
        return [list(pair) for pair in zip(xs, ys, strict=True)]
    if isinstance(value, list):
        return [[item.get("x"), item.get("y")] if isinstance(item, Mapping) else item for item in value]
    return value


def _unwrapped(text: str) -> str:
    """A text without the tags of an answer and without a fence around it."""
    for pattern in (_ANSWER, _FENCE):
        found = pattern.search(text)
        text = found[1] if found else text
    return text.strip()


def _with_lists(value: object) -> object:
    """Tuples as lists, at every depth."""
    if isinstance(value, list | tuple):
        return [_with_lists(item) for item in value]
    return {key: _with_lists(item) for key, item in value.items()} if isinstance(value, dict) else value


def _first(entry: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """The value of the first of several keys that is there."""
    return next((entry[key] for key in keys if entry.get(key) is not None), None)


def _of_coco(solution: Mapping[str, Any]) -> list[dict[str, object]]:
    """Objects from the parallel lists of COCO's numbers and boxes."""
    numbers, boxes = solution.get("target_id"), solution.get("target_box")
    if not isinstance(numbers, list) or not isinstance(boxes, list) or len(numbers) != len(boxes):
        raise RowError("solution: target_id and target_box must be lists of the same length")
    unknown = [number for number in numbers if type(number) is not int or number not in COCO_NAME_OF]
    if unknown:
        raise RowError(f"solution: target_id must hold COCO's category numbers, got {short_repr(unknown[0])}")
    return [{"box": box, "label": COCO_NAME_OF[number]} for number, box in zip(numbers, boxes, strict=True)]
