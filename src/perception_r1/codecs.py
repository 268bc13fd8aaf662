"""How each model family writes boxes: the only place that knows.

The same codec writes the answers that SFT teaches and reads completions in training, evaluation and offline scoring.
What it reads is hostile: every pattern here runs in linear time, numbers and counts are bounded, nothing is evaluated.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from math import isfinite
from typing import Any, ClassVar

from perception_r1.errors import UserError
from perception_r1.records import Box, ImageSize, LabelledBox

MAX_OBJECTS = 512
"""Most objects that are read from one answer; COCO's fullest image has 93. A longer list is no answer."""

_PER_MILLE = 1000
_NUMBER = r"-?[0-9]++(?:\.[0-9]++)?"
_QWEN2_TOKEN = re.compile(
    # possessive (`*+`), so that a label without an end is given up at once
    r"<\|object_ref_start\|>(?P<label>(?!<\|)[^<]*+(?:<(?!\|)[^<]*+)*+)<\|object_ref_end\|>"
    r"|<\|box_start\|>"
    rf"\(\s*+(?P<x1>{_NUMBER})\s*+,\s*+(?P<y1>{_NUMBER})\s*+\)\s*+,"
    rf"\s*+\(\s*+(?P<x2>{_NUMBER})\s*+,\s*+(?P<y2>{_NUMBER})\s*+\)"
    r"<\|box_end\|>"
)
_INTERNVL_TAG = re.compile(r"</?(?:ref|box)>")
_INTERNVL_BOX = re.compile(r"\[" + r"\s*+,".join([rf"\s*+({_NUMBER})"] * 4) + r"\s*+\]")
_ANY_BOX = _INTERNVL_BOX.pattern.replace(f"({_NUMBER})", _NUMBER)
_INTERNVL_LABEL = r"<ref>(?P<label>[^<]*+(?:<(?!/?(?:ref|box)>)[^<]*+)*+)</ref>"
_INTERNVL_TOKEN = re.compile(
    rf"{_INTERNVL_LABEL}|<box>\[(?P<boxes>\s*+{_ANY_BOX}(?:\s*+,\s*+{_ANY_BOX})*+\s*+)\]</box>"
)
_INTERNVL_START = re.compile(rf"{_INTERNVL_LABEL}|<box>\[")
_INTERNVL_FIRST = re.compile(rf"\s*+{_INTERNVL_BOX.pattern}")
_INTERNVL_NEXT = re.compile(rf"\s*+,\s*+{_INTERNVL_BOX.pattern}")
_FENCE_START, _FENCE_END = "```json", "```"
_JSON_START = re.compile(rf"\s*+(?:{_FENCE_START})?[ \t\n\r]*+\[[ \t\n\r]*+")
_JSON_NEXT = re.compile(r"[ \t\n\r]*+,[ \t\n\r]*+")
_DECODER = json.JSONDecoder(parse_int=float)
"""int() refuses thousands of digits by an error and is slow on fewer; float() gives infinity."""
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
r"""Half a character, which JSON can spell (`"\ud800"`) and no file or terminal can take."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedBox:
    """One entry of an answer as it was read; None stands for a part that is missing or invalid."""

    label: str | None
    box: Box | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedBoxes:
    """The objects that an answer lists.

    Attributes:
        items: Every entry found, in order, valid or not.
        is_exact: The whole text is a list in the codec's form, nothing before, between or after it.
    """

    items: tuple[ParsedBox, ...]
    is_exact: bool


_NOTHING = ParsedBoxes(items=(), is_exact=False)


class Codec(ABC):
    """Writes and reads labelled boxes as one model family does."""

    name: ClassVar[str]
    description: ClassVar[str]
    """How it writes boxes, in a few words."""
    uses_resized_size: ClassVar[bool] = False
    """Coordinates depend on the size of the image after smart-resize, not on that of the original alone."""

    @abstractmethod
    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects."""

    @abstractmethod
    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises."""

    @abstractmethod
    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """Each object of an answer, with where in the text it ends, in characters.

        They are those of `parse_boxes` where the answer is in good form. In any other they are those up to the fault:
        what is found depends on the text before it alone, never on what follows.
        """


class Qwen2VLCodec(Codec):
    """Special tokens around label and box, integers 0..1000 of the image's width and height.

    Boxes of one label that stand next to each other share it. An empty list is the empty text, since the form has no
    brackets. Reading finds complete boxes anywhere, each with the label before it; the text is exact when it is nothing
    but labels, each followed by its boxes, and no label is repeated where its boxes could have gone on.

    >>> image_size = ImageSize(width=640, height=480, resized_width=644, resized_height=476)
    >>> text = Qwen2VLCodec().format_boxes([LabelledBox(label="cat", box=(0.1, 0.2, 0.5, 1.0))], image_size)
    >>> text
    '<|object_ref_start|>cat<|object_ref_end|><|box_start|>(100,200),(500,1000)<|box_end|>'
    >>> Qwen2VLCodec().parse_boxes(text, image_size)
    ParsedBoxes(items=(ParsedBox(label='cat', box=(0.1, 0.2, 0.5, 1.0)),), is_exact=True)
    >>> Qwen2VLCodec().parse_boxes("Here: <|box_start|>(9,9),(1,1)<|box_end|>", image_size)  # inverted, after prose
    ParsedBoxes(items=(ParsedBox(label=None, box=None),), is_exact=False)
    >>> Qwen2VLCodec().parse_boxes("", image_size)
    ParsedBoxes(items=(), is_exact=True)
    """

    name = "qwen2_vl"
    description = "between box tokens, in thousandths of the image"

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects, in their order.

        Raises:
            UserError: A label is empty or holds what could be read as a special token.
        """
        parts = []
        for label, group in groupby(objects, key=lambda item: item.label):
            if not label or "<|" in label:
                raise UserError(f"a label in the Qwen2-VL form needs text without '<|', not {label!r}")
            parts.append(f"<|object_ref_start|>{label}<|object_ref_end|>")
            for item in group:
                x1, y1, x2, y2 = _to_units(item.box, _PER_MILLE, _PER_MILLE)
                parts.append(f"<|box_start|>({x1},{y1}),({x2},{y2})<|box_end|>")
        return "".join(parts)

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises."""
        text = text.strip()
        items: list[ParsedBox] = []
        label: str | None = None
        end, is_exact, awaits_box = 0, True, False
        for token in _QWEN2_TOKEN.finditer(text):
            is_exact = is_exact and token.start() == end
            end = token.end()
            if token["label"] is not None:
                is_exact = is_exact and not awaits_box and token["label"] != label
                label, awaits_box = token["label"], True
                continue
            if len(items) == MAX_OBJECTS:
                return _NOTHING
            is_exact = is_exact and label is not None
            items.append(self._item(label, token))
            awaits_box = False
        return ParsedBoxes(items=tuple(items), is_exact=is_exact and end == len(text) and not awaits_box)

    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """See `Codec`."""
        found: list[tuple[int, ParsedBox]] = []
        label: str | None = None
        for token in _QWEN2_TOKEN.finditer(text):
            if token["label"] is not None:
                label = token["label"]
            elif len(found) < MAX_OBJECTS:
                found.append((token.end(), self._item(label, token)))
        return found

    def _item(self, label: str | None, token: re.Match[str]) -> ParsedBox:
        """A box behind a label."""
        numbers = [float(token[side]) for side in ("x1", "y1", "x2", "y2")]
        return ParsedBox(label=label, box=_from_units(numbers, _PER_MILLE, _PER_MILLE))


class InternVLCodec(Codec):
    """Tags around a label and the list of its boxes, integers 0..1000 of the image's width and height.

    It is the form of InternVL's documentation (https://internvl.readthedocs.io, chat data format, grounding): a label
    once, and all its boxes in one list behind it. An empty list of objects is the empty text. Reading finds complete
    lists anywhere, each with the label before it; the text is exact when it is nothing but labels with one list each,
    and no label is repeated where its list could have gone on.

    >>> image_size = ImageSize(width=640, height=480, resized_width=896, resized_height=448)
    >>> cats = [LabelledBox(label="cat", box=(0.1, 0.2, 0.5, 1.0)), LabelledBox(label="cat", box=(0.0, 0.0, 1.0, 1.0))]
    >>> text = InternVLCodec().format_boxes(cats, image_size)
    >>> text
    '<ref>cat</ref><box>[[100, 200, 500, 1000], [0, 0, 1000, 1000]]</box>'
    >>> [item.box for item in InternVLCodec().parse_boxes(text, image_size).items]
    [(0.1, 0.2, 0.5, 1.0), (0.0, 0.0, 1.0, 1.0)]
    >>> InternVLCodec().parse_boxes("Here: <box>[[9, 9, 1, 1]]</box>", image_size)  # inverted, after prose
    ParsedBoxes(items=(ParsedBox(label=None, box=None),), is_exact=False)
    >>> InternVLCodec().parse_boxes("<ref>cat</ref><box>[[9, 9]]</box>", image_size)  # no box
    ParsedBoxes(items=(), is_exact=False)
    """

    name = "internvl"
    description = "between box tags, in thousandths of the image"

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects, in their order.

        Raises:
            UserError: A label is empty or holds what could be read as a tag.
        """
        parts = []
        for label, group in groupby(objects, key=lambda item: item.label):
            if not label or _INTERNVL_TAG.search(label):
                raise UserError(f"a label in the InternVL form needs text without its tags, not {label!r}")
            boxes = [list(_to_units(item.box, _PER_MILLE, _PER_MILLE)) for item in group]
            parts.append(f"<ref>{label}</ref><box>{json.dumps(boxes)}</box>")
        return "".join(parts)

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises."""
        text = text.strip()
        items: list[ParsedBox] = []
        label: str | None = None
        end, is_exact, awaits_boxes = 0, True, False
        for token in _INTERNVL_TOKEN.finditer(text):
            is_label = token["label"] is not None
            is_exact = is_exact and token.start() == end and is_label != awaits_boxes
            end = token.end()
            if is_label:
                is_exact = is_exact and token["label"] != label
                label = token["label"]
            else:
                items += [self._item(label, box) for box in _INTERNVL_BOX.finditer(token["boxes"])]
            awaits_boxes = is_label
            if len(items) > MAX_OBJECTS:
                return _NOTHING
        return ParsedBoxes(items=tuple(items), is_exact=is_exact and end == len(text) and not awaits_boxes)

    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """See `Codec`."""
        found: list[tuple[int, ParsedBox]] = []
        label: str | None = None
        for token in _INTERNVL_START.finditer(text):
            if token["label"] is not None:
                label = token["label"]
                continue
            box = _INTERNVL_FIRST.match(text, token.end())
            while box is not None and len(found) < MAX_OBJECTS:
                found.append((box.end(), self._item(label, box)))
                box = _INTERNVL_NEXT.match(text, box.end())
        return found

    def _item(self, label: str | None, box: re.Match[str]) -> ParsedBox:
        """A box behind a label."""
        numbers = [float(number) for number in box.groups()]
        return ParsedBox(label=label, box=_from_units(numbers, _PER_MILLE, _PER_MILLE))


class _JsonCodec(Codec):
    """A JSON list of `{"bbox_2d": [x1, y1, x2, y2], "label": "..."}`; a subclass says in which units.

    Attributes:
        key: Under which the numbers of a box stand.
        order: In which they are written: which of x1, y1, x2, y2 comes first, and so on; twice it changes nothing.
    """

    key: ClassVar[str] = "bbox_2d"
    order: ClassVar[tuple[int, int, int, int]] = (0, 1, 2, 3)

    @abstractmethod
    def units(self, image_size: ImageSize) -> tuple[int, int]:
        """Width and height of the image in the units that are written."""

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects, in their order."""
        units = self.units(image_size)
        boxes = [_to_units(item.box, *units) for item in objects]
        written = [[box[side] for side in self.order] for box in boxes]
        return json.dumps([{self.key: box, "label": item.label} for box, item in zip(written, objects, strict=True)])

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises.

        Either the whole text, a ```json fence aside, is a JSON list, or nothing is read.
        """
        entries = _json_list(_without_fence(text))
        if entries is None:
            return _NOTHING
        units = self.units(image_size)
        return ParsedBoxes(items=tuple(self._item(entry, units) for entry in entries), is_exact=True)

    def parse_prefixes(self, text: str, image_size: ImageSize) -> list[tuple[int, ParsedBox]]:
        """See `Codec`; the first entry that is no object ends them, for where a number ends is told by what follows."""
        found: list[tuple[int, ParsedBox]] = []
        units = self.units(image_size)
        mark = _JSON_START.match(text)
        while mark is not None and len(found) < MAX_OBJECTS:
            try:
                entry, end = _DECODER.raw_decode(text, mark.end())
            except (ValueError, RecursionError):
                break
            if not isinstance(entry, dict):
                break
            found.append((end, self._item(entry, units)))
            mark = _JSON_NEXT.match(text, end)
        return found

    def _item(self, entry: object, units: tuple[int, int]) -> ParsedBox:
        """One entry of a parsed list, whatever it is."""
        label, numbers = (entry.get("label"), entry.get(self.key)) if isinstance(entry, dict) else (None, None)
        if not isinstance(label, str) or _LONE_SURROGATE.search(label):
            label = None
        if not isinstance(numbers, list) or len(numbers) != 4 or not all(type(number) is float for number in numbers):
            return ParsedBox(label=label, box=None)
        return ParsedBox(label=label, box=_from_units([numbers[side] for side in self.order], *units))


class Qwen25VLCodec(_JsonCodec):
    """JSON in pixels of the image as the model sees it, after smart-resize.

    >>> image_size = ImageSize(width=1280, height=960, resized_width=644, resized_height=476)
    >>> text = Qwen25VLCodec().format_boxes([LabelledBox(label="cat", box=(0.25, 0.5, 0.5, 1.0))], image_size)
    >>> text
    '[{"bbox_2d": [161, 238, 322, 476], "label": "cat"}]'
    >>> Qwen25VLCodec().parse_boxes(text, image_size)
    ParsedBoxes(items=(ParsedBox(label='cat', box=(0.25, 0.5, 0.5, 1.0)),), is_exact=True)
    >>> Qwen25VLCodec().parse_boxes('Sure! ' + text, image_size)
    ParsedBoxes(items=(), is_exact=False)
    >>> Qwen25VLCodec().parse_boxes('[{"bbox_2d": [0, 238, 9999, 476]}]', image_size)  # clamped, no label
    ParsedBoxes(items=(ParsedBox(label=None, box=(0.0, 0.5, 1.0, 1.0)),), is_exact=True)
    """

    name = "qwen2_5_vl"
    description = "as JSON, in pixels of the image as the model sees it, after smart-resize"
    uses_resized_size = True

    def units(self, image_size: ImageSize) -> tuple[int, int]:
        """The size after smart-resize."""
        return image_size.resized_width, image_size.resized_height


class Qwen3VLCodec(_JsonCodec):
    """The JSON of Qwen2.5-VL with numbers 0..1000 of the image's width and height.

    >>> image_size = ImageSize(width=1280, height=960, resized_width=1280, resized_height=960)
    >>> Qwen3VLCodec().format_boxes([LabelledBox(label="cat", box=(0.25, 0.5, 0.5, 1.0))], image_size)
    '[{"bbox_2d": [250, 500, 500, 1000], "label": "cat"}]'
    >>> Qwen3VLCodec().parse_boxes("null", image_size)
    ParsedBoxes(items=(), is_exact=False)
    >>> Qwen3VLCodec().parse_boxes("[]", image_size)
    ParsedBoxes(items=(), is_exact=True)
    """

    name = "qwen3_vl"
    description = "as JSON, in thousandths of the image"

    def units(self, image_size: ImageSize) -> tuple[int, int]:
        """Per mille of both sides."""
        return _PER_MILLE, _PER_MILLE


class Gemma3Codec(_JsonCodec):
    """JSON as Gemini writes it: rows before columns, numbers 0..1000 of the image's height and width.

    Gemma's own documentation names no form. Its authors point to that of Gemini, which Gemma is made after
    (https://huggingface.co/google/gemma-3-4b-it/discussions/38, and Gemini's page on bounding boxes); a model that has
    to learn a form anyway learns this one from the nearest start.

    >>> image_size = ImageSize(width=1280, height=960, resized_width=896, resized_height=896)
    >>> text = Gemma3Codec().format_boxes([LabelledBox(label="cat", box=(0.25, 0.5, 0.75, 1.0))], image_size)
    >>> text
    '[{"box_2d": [500, 250, 1000, 750], "label": "cat"}]'
    >>> Gemma3Codec().parse_boxes(text, image_size)
    ParsedBoxes(items=(ParsedBox(label='cat', box=(0.25, 0.5, 0.75, 1.0)),), is_exact=True)
    >>> Gemma3Codec().parse_boxes('[{"bbox_2d": [500, 250, 1000, 750]}]', image_size)  # another family's key
    ParsedBoxes(items=(ParsedBox(label=None, box=None),), is_exact=True)
    """

    name = "gemma3"
    description = "as JSON, rows before columns, in thousandths of the image"
    key = "box_2d"
    order = (1, 0, 3, 2)

    def units(self, image_size: ImageSize) -> tuple[int, int]:
        """Per mille of both sides."""
        return _PER_MILLE, _PER_MILLE


CODECS: dict[str, Codec] = {
    codec.name: codec for codec in (Qwen2VLCodec(), Qwen25VLCodec(), Qwen3VLCodec(), InternVLCodec(), Gemma3Codec())
}
"""Every codec by name."""


def _without_fence(text: str) -> str:
    text = text.strip()
    if text.startswith(_FENCE_START) and text.endswith(_FENCE_END):
        text = text[len(_FENCE_START) : -len(_FENCE_END)]
    return text


def _json_list(text: str) -> list[Any] | None:
    """A list of bounded length, or None."""
    try:
        entries = _DECODER.decode(text)
    except (ValueError, RecursionError):
        return None
    return entries if isinstance(entries, list) and len(entries) <= MAX_OBJECTS else None


def _to_units(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
    """A box in whole units: inside the image, never inverted, and at least one unit wide and high."""
    x1, x2 = _interval(box[0] * width, box[2] * width, width)
    y1, y2 = _interval(box[1] * height, box[3] * height, height)
    return x1, y1, x2, y2


def _interval(start: float, end: float, limit: int) -> tuple[int, int]:
    """Whole numbers next to start and end in 0..limit; where they meet, the unit that holds the start."""
    low, high = max(round(start), 0), min(round(end), limit)
    if low >= high:
        low = min(max(int(start), 0), limit - 1)
        high = low + 1
    return low, high


def _from_units(numbers: Sequence[float], width: int, height: int) -> Box | None:
    """A box in fractions, clamped to the image; None when it is not finite, inverted or empty."""
    if not all(isfinite(number) for number in numbers):
        return None
    x1, x2 = (min(max(number / width, 0.0), 1.0) for number in numbers[::2])
    y1, y2 = (min(max(number / height, 0.0), 1.0) for number in numbers[1::2])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
