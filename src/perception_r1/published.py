"""How the public evaluation code of Perception-R1 reads answers, which is how the published metrics were computed.

It is laxer than `codecs.py`: it takes boxes out of any text around them. Source: github.com/linkangheng/PR1, folder
eval. Here hostile text takes linear time and nothing is evaluated. Where that code fails with an error, so that no
metric comes of it, there is no box here.
"""

import ast
import json
import re
import warnings
from collections.abc import Collection
from math import isfinite

Corners = tuple[float, float, float, float]
"""Numbers as an answer writes them, x1, y1, x2, y2: neither clamped nor put in order."""
LabelledCorners = tuple[str, Corners]

_BOX_START, _BOX_END = "<|box_start|>", "<|box_end|>"
_NUMBER = r"(-?\d++(?:\.\d*+)?+)"
_COMMA = r",\s*+"
_FOUR_NUMBERS = (
    re.compile(rf"\[\s*+{_NUMBER}{_COMMA}{_NUMBER}{_COMMA}{_NUMBER}{_COMMA}{_NUMBER}\s*+\]"),
    re.compile(rf"\(\s*+{_NUMBER}{_COMMA}{_NUMBER}{_COMMA}{_NUMBER}{_COMMA}{_NUMBER}\s*+\)"),
    re.compile(rf"\(\s*+{_NUMBER}{_COMMA}{_NUMBER}\)\s*+,\s*+\(\s*+{_NUMBER}{_COMMA}{_NUMBER}\s*+\)"),
)
"""Ways to write a box, the first of which is looked for in the whole text before the next."""
_SPECIAL_TOKENS = re.compile(
    r"<\|(?:endoftext|im_start|im_end|object_ref_start|object_ref_end|box_start|box_end|quad_start|quad_end"
    r"|vision_start|vision_end|vision_pad|image_pad|video_pad)\|>"
)
_FAR = 1e9
"""A number further from 0 is taken as this one, so that all are finite."""
_MAX_LITERAL = 256
"""Longest text between two box tokens that is read; the four numbers of a box take some 20 characters."""


def first_box(text: str) -> Corners:
    """The first four numbers in brackets, in per mille; four zeros without any.

    With no box token in the text they are taken as fractions, and cut to whole per mille.

    >>> first_box("<|object_ref_start|>cup<|object_ref_end|><|box_start|>(1,2),(3,4)<|box_end|> or (5,6),(7,8)")
    (1.0, 2.0, 3.0, 4.0)
    >>> first_box("It is at [0.1, 0.2, 0.35, 0.4999].")
    (100.0, 200.0, 350.0, 499.0)
    >>> first_box("nowhere")
    (0.0, 0.0, 0.0, 0.0)
    """
    found = next((match for pattern in _FOUR_NUMBERS if (match := pattern.search(text))), None)
    numbers = [min(max(float(number), -_FAR), _FAR) for number in found.groups()] if found else [0.0] * 4
    if _BOX_START not in text:
        numbers = [float(int(number * 1000)) for number in numbers]
    x1, y1, x2, y2 = numbers
    return x1, y1, x2, y2


def count_boxes(text: str) -> int:
    """How many pairs of points stand between box tokens, whatever is around them.

    >>> count_boxes("Two: <|box_start|>(1,2),(3,4)<|box_end|> and <|box_start|>[5, 6], [7, 8.5]<|box_end|>")
    2
    >>> count_boxes("<|box_start|>(01,2),(3,4)<|box_end|><|box_start|>1,2,3,4<|box_end|>")  # no number, no points
    0
    """
    return sum(_is_pair_of_points(part) for part in _between_box_tokens(text.replace("<|endoftext|>", "")))


def json_boxes(text: str, labels: Collection[str]) -> list[LabelledCorners]:
    r"""The known objects of a JSON list, up to an entry that has no label, or a known one and not four numbers.

    Code fences, special tokens and what surrounds an answer in its tags do not count.

    >>> json_boxes('```json\n[{"label": "cat", "bbox_2d": [1, 2, 3.5, 4]}, {"label": "cow"}]```', {"cat", "dog"})
    [('cat', (1.0, 2.0, 3.5, 4.0))]
    >>> json_boxes('[{"label": "cat"}, {"label": "cat", "bbox_2d": [1, 2, 3, 4]}]', {"cat", "dog"})
    []
    >>> json_boxes('Sure! [{"label": "cat", "bbox_2d": [1, 2, 3, 4]}]', {"cat", "dog"})
    []
    """
    text = without_special_tokens(text)
    if "<answer>" in text:
        text = text.split("<answer>")[1].split("</answer>")[0]
    try:
        entries = json.loads(text.replace("```json", "").replace("```", ""), parse_int=float)
    except (ValueError, RecursionError):
        return []
    boxes: list[LabelledCorners] = []
    for entry in entries if isinstance(entries, list) else ():
        if not isinstance(entry, dict) or isinstance(entry.get("label", []), list | dict):
            break
        label, numbers = entry["label"], entry.get("bbox_2d")
        if label not in labels:
            continue
        if not isinstance(numbers, list) or len(numbers) != 4 or not all(map(_is_number, numbers)):
            break
        x1, y1, x2, y2 = map(float, numbers)
        boxes.append((label, (x1, y1, x2, y2)))
    return boxes


def without_special_tokens(text: str) -> str:
    """The text as it is decoded without the special tokens of these models.

    >>> without_special_tokens("on quick<|im_end|>")
    'on quick'
    """
    return _SPECIAL_TOKENS.sub("", text)


def _between_box_tokens(text: str) -> list[str]:
    """What stands between a start and the next end on one line."""
    parts = []
    for line in text.split("\n"):
        end = 0
        while (start := line.find(_BOX_START, end)) >= 0 and (end := line.find(_BOX_END, start)) >= 0:
            parts.append(line[start + len(_BOX_START) : end])
    return parts


def _is_pair_of_points(text: str) -> bool:
    """Whether a text is a Python literal of two pairs of numbers; other expressions are not evaluated and are none."""
    if len(text) > _MAX_LITERAL:
        return False
    try:
        with warnings.catch_warnings(action="ignore"):  # of strange literals
            (x1, y1), (x2, y2) = ast.literal_eval(text)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return all(isinstance(number, int | float | complex) for number in (x1, y1, x2, y2))


def _is_number(value: object) -> bool:
    """Whether JSON gave a number that an area can be computed from; true and false are numbers in Python."""
    return isinstance(value, float | bool) and isfinite(value)
