"""How models write boxes: the interface of codecs, and what they share; each model family has its own beside it.

The same codec writes the answers that SFT teaches and reads completions in training, evaluation and offline scoring.
What it reads is hostile: every pattern here runs in linear time, numbers and counts are bounded, nothing is evaluated.
"""

import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

from perception_r1.records import Box, ImageSize, LabelledBox

MAX_OBJECTS = 512
"""Most objects that are read from one answer; COCO's fullest image has 93. A longer list is no answer."""

PER_MILLE = 1000
NUMBER = r"-?[0-9]++(?:\.[0-9]++)?"
"""A number in a pattern; possessive (`++`), so that what does not fit is given up at once."""
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


NOTHING = ParsedBoxes(items=(), is_exact=False)
"""An answer that cannot be read."""


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


class JsonCodec(Codec):
    """A JSON list of `{"bbox_2d": [x1, y1, x2, y2], "label": "..."}`, numbers 0..1000 of the image's width and height.

    Attributes:
        key: Under which the numbers of a box stand.
        order: In which they are written: which of x1, y1, x2, y2 comes first, and so on; twice it changes nothing.
        entry_types: What an entry may be: an object, or the numbers of a box alone.
    """

    key: ClassVar[str] = "bbox_2d"
    order: ClassVar[tuple[int, int, int, int]] = (0, 1, 2, 3)
    entry_types: ClassVar[tuple[type, ...]] = (dict,)

    def units(self, image_size: ImageSize) -> tuple[int, int]:
        """Width and height of the image in the units that are written."""
        return PER_MILLE, PER_MILLE

    def format_boxes(self, objects: Sequence[LabelledBox], image_size: ImageSize) -> str:
        """Text for a list of objects, in their order."""
        units = self.units(image_size)
        boxes = [to_units(item.box, *units) for item in objects]
        written = [[box[side] for side in self.order] for box in boxes]
        return json.dumps([self.entry(box, item.label) for box, item in zip(written, objects, strict=True)])

    def entry(self, box: list[int], label: str) -> dict[str, Any]:
        """What is written of an object."""
        return {self.key: box, "label": label}

    def parse_boxes(self, text: str, image_size: ImageSize) -> ParsedBoxes:
        """Objects found in any text whatever; never raises.

        Either the whole text, a ```json fence aside, is a JSON list, or nothing is read.
        """
        entries = _json_list(_without_fence(text))
        if entries is None:
            return NOTHING
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
            if not isinstance(entry, self.entry_types):
                break
            found.append((end, self._item(entry, units)))
            mark = _JSON_NEXT.match(text, end)
        return found

    def _item(self, entry: object, units: tuple[int, int]) -> ParsedBox:
        """One entry of a parsed list, whatever it is."""
        bare = entry if isinstance(entry, self.entry_types) else None
        label, numbers = (entry.get("label"), entry.get(self.key)) if isinstance(entry, dict) else (None, bare)
        if not isinstance(label, str) or _LONE_SURROGATE.search(label):
            label = None
        if not isinstance(numbers, list) or len(numbers) != 4 or not all(type(number) is float for number in numbers):
            return ParsedBox(label=label, box=None)
        return ParsedBox(label=label, box=from_units([numbers[side] for side in self.order], *units))


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


def to_units(box: Box, width: int, height: int) -> tuple[int, int, int, int]:
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


def from_units(numbers: Sequence[float], width: int, height: int) -> Box | None:
    """A box in fractions, clamped to the image; None when it is not finite, inverted or empty."""
    if not all(isfinite(number) for number in numbers):
        return None
    x1, x2 = (min(max(number / width, 0.0), 1.0) for number in numbers[::2])
    y1, y2 = (min(max(number / height, 0.0), 1.0) for number in numbers[1::2])
    return (x1, y1, x2, y2) if x1 < x2 and y1 < y2 else None
